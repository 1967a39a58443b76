"""Divergences between the softened class probabilities of teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metakd._basics.checks import once
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import class_logits, teacher_logits, tensor_in
from metakd.terms.softened import Softened, mass_of, softened


@dataclass(frozen=True)
class SoftTarget(Softened):
    """Knowledge distillation: divergence of the student from the teacher, both softened.

    `loss_i = T^2 KL(p_i || q_i) = T^2 sum_c p_ic (log p_ic - log q_ic)` with the teacher's
    `p = softmax(z_teacher / T)` and the student's `q = softmax(z_student / T)`. The factor `T^2` keeps
    the gradient's size when `T` changes. A `power` `a` replaces `p` by `p^a`, renormalised, which is
    `softmax(a z_teacher / T)`. A power below 1 moves mass towards classes that the teacher seldom predicts. No
    gradient flows into the teacher.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), who use the cross-entropy. The
    divergence has the same gradient and is zero where the student equals the teacher. The power is that of He, Wu,
    Wei, DiVE (ICCV 2021, arXiv 2103.15042), who use `power=0.5` and `temperature=3`.

    Args:
        temperature: `T > 0`.
        power: `a > 0`.

    Raises:
        MetaKDError: `temperature` or `power` is not positive and finite; in a call, the teacher's outputs are missing
            or differ in shape from the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import SoftTarget
        >>> teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> SoftTarget(temperature=4.0)(torch.tensor([[4.0, 0.0], [4.0, 0.0]]), Batch(None, teacher=teacher))
        tensor([0.0000, 7.3939])
    """

    temperature: float = 4.0
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.power > 0.0 and math.isfinite(self.power)):
            raise MetaKDError(
                f"power is {self.power}, but must be positive and finite; 1 leaves the teacher's probabilities as "
                "they are, 0.5 flattens them as DiVE does"
            )

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        teacher, mass = self._of_teacher(student, batch)
        return self._divergence(of=teacher, given=softened(student, self.temperature), mass=mass)

    def _of_teacher(self, student: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's log probabilities and their mass, which stay the same in a call."""

        def both() -> tuple[Tensor, Tensor]:
            found = softened(teacher_logits(student, batch), self.temperature / self.power)
            return found, mass_of(found, self.temperature)

        if (given := tensor_in(batch.teacher)) is None:
            return both()  # which raises
        key = type(self), self.temperature, self.power, student.shape, student.dtype, student.device
        known: tuple[Tensor, Tensor] = once(given, key, both)
        return known


@dataclass(frozen=True)
class ReverseSoftTarget(Softened):
    """Reverse divergence: of the teacher from the student, both softened.

    `loss_i = T^2 KL(q_i || p_i) = T^2 sum_c q_ic (log q_ic - log p_ic)` with the teacher's
    `p = softmax(z_teacher / T)` and the student's `q = softmax(z_student / T)`. It punishes mass that the
    student puts where the teacher has none.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: one of the two divergences that Amara et al., BD-KD (2022, arXiv 2212.12965), balance.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: as `SoftTarget`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import ReverseSoftTarget
        >>> batch = Batch(None, teacher=torch.tensor([[0.0, 0.0]]))
        >>> ReverseSoftTarget(temperature=1.0)(torch.tensor([[0.0, 2.0]]), batch)
        tensor([0.3278])
    """

    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        teacher = softened(teacher_logits(student, batch), self.temperature)
        return self._divergence(of=softened(student, self.temperature), given=teacher)
