"""What a cell is trained with, for each of the presets."""

from dataclasses import asdict, dataclass, replace
from typing import Any

DECAYS = (2 / 3, 5 / 6)
"""The shares of the epochs after which a student's learning rate falls to a tenth."""


@dataclass(frozen=True)
class Preset:
    """Everything but data set, imbalance, method and seed that decides a cell's numbers.

    Attributes:
        teacher: network, see `metakd.longtail.build_model`.
        student: likewise.
        teacher_epochs: of the teacher; its learning rate falls to a tenth after 5/8, 3/4 and 7/8 of them.
        teacher_lr: of the teacher's SGD.
        teacher_batch_size: of the teacher.
        epochs: of the student; its learning rate falls to a tenth after 2/3 and 5/6 of them.
        lr: of the student's SGD, momentum 0.9, weight decay 5e-4.
        batch_size: of training and meta batches.
        weighting_lr: of the weight models' Adam.
        validation_per_class: images of the validation set, the meta set; None for `LongTailed.cut`'s default.
        choice_per_class: images set aside for a choice among methods, in place of the test images; 0 for none.
        evaluate_every: epochs between two evaluations; only the last one's accuracy is reported.
        datasets: default of --datasets.
        imbalances: default of --imbalances.
        seeds: default of --seeds.
    """

    teacher: str
    student: str
    teacher_epochs: int
    epochs: int
    teacher_lr: float = 0.05
    teacher_batch_size: int = 64
    lr: float = 0.1
    batch_size: int = 100
    weighting_lr: float = 1e-3
    validation_per_class: int | None = None
    choice_per_class: int = 0
    evaluate_every: int = 10
    datasets: tuple[str, ...] = ("cifar10",)
    imbalances: tuple[float, ...] = (50.0,)
    seeds: tuple[int, ...] = (0, 1, 2)

    def settings(self, *, learned: bool) -> dict[str, Any]:
        """What decides a cell's numbers, as plain values; a learned method has some more."""
        others = {"datasets", "imbalances", "seeds", "evaluate_every"} | (set() if learned else {"weighting_lr"})
        others |= set() if self.choice_per_class else {"choice_per_class"}
        found = {key: value for key, value in asdict(self).items() if key not in others}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    def of_teacher(self) -> "Preset":
        """The preset with which the teacher is trained as if it were a student."""
        return replace(
            self,
            student=self.teacher,
            epochs=self.teacher_epochs,
            lr=self.teacher_lr,
            batch_size=self.teacher_batch_size,
        )


PAPER = Preset(
    "resnet32x4",
    "resnet8x4",
    teacher_epochs=240,
    epochs=120,
    datasets=("cifar10", "cifar100"),
    imbalances=(50.0, 100.0),
)

# What two CPU cores do overnight: an eighth of the width, a stem of stride 2, a sixth of the epochs.
SMALL = replace(
    PAPER, teacher="resnet14s2", student="resnet8s2", teacher_epochs=30, epochs=20, datasets=("cifar10",),
    evaluate_every=5,
)  # fmt: skip

# Seconds: does it run?
SMOKE = Preset(
    "convnet4", "mlp8", teacher_epochs=1, epochs=2, teacher_batch_size=32, lr=0.05, batch_size=32,
    validation_per_class=10, datasets=("digits",), imbalances=(20.0,), seeds=(0, 1),
)  # fmt: skip

PRESETS = {
    # METHODS of BiKD: arXiv 2605.17839 and its published code.
    "paper": PAPER,
    "small": SMALL,
    # Seeds of their own, and no test image: to choose among methods.
    "choice": replace(SMALL, validation_per_class=100, choice_per_class=200, imbalances=(50.0, 100.0), seeds=(10, 11)),
    "smoke": SMOKE,
    "smoke-choice": replace(SMOKE, choice_per_class=8, seeds=(10,)),
}
