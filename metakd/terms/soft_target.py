"""Divergences between the teacher's and the student's softened class probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import logits, teacher_logits


@dataclass(frozen=True)
class _Softened:
    """What both directions share: the temperature, its check, and both log probabilities."""

    temperature: float = 4.0
    uses_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise MetaKDError(
                f"temperature is {self.temperature}, it must be positive and finite; 1 leaves the "
                "probabilities as they are, 4 is a common choice for distillation"
            )

    def _log_probabilities(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        student = logits(outputs)
        return self._softened(student), self._softened(teacher_logits(student, batch))

    def _softened(self, z: Tensor) -> Tensor:
        # Log probabilities of -inf (masked classes, overflow) would make 0 * inf = NaN in the divergence.
        return F.log_softmax(z / self.temperature, dim=1).clamp(min=torch.finfo(z.dtype).min)

    def _divergence(self, of: Tensor, given: Tensor) -> Tensor:
        """`T^2 KL(of || given)` of each row, both as log probabilities."""
        return self.temperature**2 * F.kl_div(given, of, reduction="none", log_target=True).sum(dim=1)


class SoftTarget(_Softened):
    """Knowledge distillation: divergence of the student from the teacher, both softened.

    `loss_i = T^2 KL(p_i || q_i) = T^2 sum_c p_ic (log p_ic - log q_ic)` with the teacher's
    `p = softmax(z_teacher / T)` and the student's `q = softmax(z_student / T)`. The factor `T^2` keeps
    the size of the gradient when `T` changes. It covers every class the teacher gives mass to.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015). Ours differs in that
    it is the divergence, not the cross-entropy (same gradient, and zero where the student equals the
    teacher), and that no gradient ever flows into the teacher.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: `temperature` not positive; when called, the teacher's outputs missing or of another
            shape than the student's.

    Example:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import SoftTarget
        >>> teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> SoftTarget(temperature=4.0)(torch.tensor([[4.0, 0.0], [4.0, 0.0]]), Batch(None, teacher=teacher))
        tensor([0.0000, 7.3939])
    """

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student, teacher = self._log_probabilities(outputs, batch)
        return self._divergence(of=teacher, given=student)


class ReverseSoftTarget(_Softened):
    """Reverse divergence: of the teacher from the student, both softened.

    `loss_i = T^2 KL(q_i || p_i) = T^2 sum_c q_ic (log q_ic - log p_ic)` with the teacher's
    `p = softmax(z_teacher / T)` and the student's `q = softmax(z_student / T)`. It punishes mass the
    student puts where the teacher has none.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: one of the two divergences that Sepahvand, Meyer, Gross, BD-KD (2022, arXiv 2212.12965) balance.
    Ours differs in that the balance between them is no part of the term, and that no gradient ever flows into
    the teacher.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: `temperature` not positive; when called, the teacher's outputs missing or of another
            shape than the student's.

    Example:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import ReverseSoftTarget
        >>> batch = Batch(None, teacher=torch.tensor([[0.0, 0.0]]))
        >>> ReverseSoftTarget(temperature=1.0)(torch.tensor([[0.0, 2.0]]), batch)
        tensor([0.3278])
    """

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student, teacher = self._log_probabilities(outputs, batch)
        return self._divergence(of=student, given=teacher)
