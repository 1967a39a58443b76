"""What a run is made with, for each of the presets."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Everything but setting, meta set, recipe and seed that decides a run's numbers.

    Attributes:
        dataset: see `metakd.longtail.load_images`; "cifar10" may be a folder of pictures.
        student: "mlp", a network of one hidden layer on features, or "cnn", three convolutions on the images.
        filters: of the fixed convolutional features; 0 for the pixels themselves.
        stride: of the patches.
        components: principal components of the features that the student sees.
        hidden: the student's hidden units; of the convolutions the channels.
        per_class: training images of each class, before a long tail is cut.
        largest_meta: images of each class set aside for the meta set, of which a cell may take fewer.
        validation: images of each class to choose by.
        steps: of training; the learning rate follows a cosine.
        batch_size: of training and meta batches.
        lr: of SGD with momentum 0.9 and weight decay 5e-4.
        metas: default of --meta, images of each class; the first one is the main one.
        seeds: default of --seeds.
        settings: default of --settings; all where there are none.
        few: whether only the main rows are run, with fewer variants.
        version: raised whenever the code changes what a cell's numbers are.
    """

    dataset: str = "cifar10"
    filters: int = 400
    stride: int = 2
    components: int = 256
    hidden: int = 128
    per_class: int = 465
    largest_meta: int = 100
    validation: int = 25
    steps: int = 400
    batch_size: int = 128
    lr: float = 0.03
    metas: tuple[int, ...] = (25,)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[str, ...] = ()
    few: bool = False
    version: int = 1
    student: str = "mlp"

    def protocol(self) -> dict[str, Any]:
        """What decides a run's numbers, as plain values."""
        aside = {"metas", "seeds", "settings", "few", *(["student"] if self.student == "mlp" else [])}
        return {k: v for k, v in asdict(self).items() if k not in aside}


SMALL = Preset()
PRESETS = {
    # What one CPU core does in an hour.
    "small": SMALL,
    # All of CIFAR-10, wider features and student, five seeds and three sizes of the meta set.
    "paper": replace(
        SMALL, filters=1600, stride=1, components=1024, hidden=512, per_class=4800, steps=5000, metas=(25, 10, 100),
        seeds=(0, 1, 2, 3, 4),
    ),
    # The second data set, scikit-learn's digits: a few minutes.
    "digits": replace(
        SMALL, dataset="digits", filters=0, components=64, hidden=64, per_class=90, largest_meta=10, validation=10,
        steps=200, batch_size=64, lr=0.1, metas=(10,), settings=("sources", "annotators"),
    ),
    # A small convolutional network on the images themselves, the main rows: half an hour. The learning rate and the
    # length are those with which the oracle does well on validation samples of other splits than those of the table.
    "cnn": replace(
        SMALL, student="cnn", filters=0, stride=0, components=0, hidden=32, lr=0.3, few=True,
        settings=("sources", "annotators"),
    ),
    # Seconds: does it run?
    "smoke": replace(
        SMALL, dataset="digits", filters=0, components=64, hidden=16, per_class=60, largest_meta=5, validation=5,
        steps=4, batch_size=32, lr=0.1, metas=(5,), seeds=(0,), settings=("sources", "teachers"),
    ),
}  # fmt: skip
