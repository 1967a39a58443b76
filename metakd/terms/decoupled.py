"""Distillation in two parts: the probability of the label, and the distribution over the other classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.terms.reading import class_indices, class_logits, teacher_logits
from metakd.terms.softened import Softened, floored, log_masses, softened


@dataclass(frozen=True)
class TargetClass(Softened):
    """Target-class distillation (DKD's TCKD): divergence in the probability of the label.

    `loss_i = T^2 KL(b_i^p || b_i^q)` with `b = (p_y, 1 - p_y)`, the probabilities of the label `y` and of all other
    classes together, for the teacher's `p = softmax(z_teacher / T)` and the student's `q = softmax(z_student / T)`.
    For each sample `SoftTarget = TargetClass + (1 - p_y) NonTargetClass`.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), C at least 2,
    `batch.targets` `(B,)` integers, result `(B,)`.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679), the term with factor alpha.
    Neither the factor nor its warm-up is included.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: `temperature` is not positive and finite; in a call, there is a single class, targets are missing,
            are not `(B,)` integers, or are out of range, or the teacher's outputs are missing or differ in shape from
            the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import TargetClass
        >>> batch = Batch(None, targets=torch.tensor([0]), teacher=torch.tensor([[2.0, 1.0, 0.0]]))
        >>> TargetClass(temperature=1.0)(torch.tensor([[2.0, 0.0, 1.0]]), batch)  # as sure of the label
        tensor([0.])
    """

    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student, teacher = _target_and_rest(outputs, batch, self.temperature)
        return self._divergence(of=log_masses(teacher), given=log_masses(student))


@dataclass(frozen=True)
class NonTargetClass(Softened):
    """Non-target-class distillation (DKD's NCKD): divergence among the classes other than the label.

    `loss_i = T^2 KL(p^_i || q^_i)` with the teacher's `p^` and the student's `q^` the softmax of `z / T` over
    the C - 1 classes other than the label. Plain distillation multiplies this by the teacher's `1 - p_y`, which
    suppresses it where the teacher is confident; see `TargetClass`.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), C at least 2,
    `batch.targets` `(B,)` integers, result `(B,)`.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679), the term with factor beta.
    Neither the factor nor its warm-up is included. The label is left out exactly; the authors' code subtracts 1000
    from its logit.

    Args:
        temperature: `T > 0`.

    Raises:
        MetaKDError: as `TargetClass`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import NonTargetClass
        >>> batch = Batch(None, targets=torch.tensor([0]), teacher=torch.tensor([[9.0, 1.0, 0.0]]))
        >>> NonTargetClass(temperature=1.0)(torch.tensor([[2.0, 0.0, 1.0]]), batch)
        tensor([0.4621])
    """

    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        (_, student), (_, teacher) = _target_and_rest(outputs, batch, self.temperature)
        return self._divergence(of=softened(teacher), given=softened(student))


def _target_and_rest(outputs: Any, batch: Batch, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """For student and teacher, the softened logits `(B, 1)` of the label and `(B, C - 1)` of the other classes."""
    student = class_logits(outputs)
    teacher = teacher_logits(student, batch)
    labels = class_indices(student, batch)[:, None]
    others = torch.arange(student.shape[1] - 1, device=labels.device)
    others = others + (others >= labels)
    return [(z.gather(1, labels), z.gather(1, others)) for z in (floored(x / temperature) for x in (student, teacher))]
