"""Soft targets with a larger weight where the student is worse than the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.terms.reading import class_indices, class_logits, teacher_logits
from metakd.terms.softened import Softened, softened


@dataclass(frozen=True)
class GatedSoftTarget(Softened):
    """Weighted soft labels (WSL): soft cross-entropy times a gate that compares both networks' losses.

    `loss_i = T^2 g_i (-sum_c p_ic log q_ic)` with the teacher's `p = softmax(z_teacher / T)`, the student's
    `q = softmax(z_student / T)` and the gate `g_i = 1 - exp(-CE_student,i / CE_teacher,i)`, whose cross-entropies with
    the label are at `T = 1`. The gate lies between 0 and 1 and is near 1 where the student is much worse than the
    teacher. Where `CE_teacher` is 0 it is its limit 1, or 0 if `CE_student` is 0 too.

    Autograd treats the gate as a constant. This is exact for one inner step. Over several steps, the hypergradient
    omits how earlier steps change the gates of later ones.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), `batch.targets` `(B,)`
    integers, result `(B,)`.

    Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective"
    (ICLR 2021, arXiv 2102.00650). The paper adds cross-entropy and a factor of 2.25 to 2.5; this is the soft term
    alone. The authors' code adds 1e-7 to `CE_teacher`; here the limit is taken.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: `temperature` is not positive and finite; in a call, targets are missing, are not `(B,)`
            integers, or are out of range, or the teacher's outputs are missing or differ in shape from the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import GatedSoftTarget
        >>> batch = Batch(None, targets=torch.tensor([0, 0]), teacher=torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        >>> GatedSoftTarget(temperature=1.0)(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), batch)
        tensor([0.2309, 1.8885])
    """

    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        teacher = teacher_logits(student, batch)
        labels = class_indices(student, batch)[:, None]
        hard, teachers_hard = (-softened(z.detach()).gather(1, labels).squeeze(1) for z in (student, teacher))
        ratio = hard / teachers_hard.clamp(min=torch.finfo(student.dtype).tiny)
        gate = -torch.expm1(-ratio)
        p, log_q = softened(teacher, self.temperature).exp(), softened(student, self.temperature)
        return self.temperature**2 * gate * -(p * log_q).sum(dim=1)
