"""Soft targets that give rare classes a larger share than the teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.counts import PerClass, positive_counts
from metakd.terms.reading import class_logits, teacher_logits
from metakd.terms.softened import Softened, softened


@dataclass(frozen=True)
class RebalancedSoftTarget(Softened):
    """Balanced knowledge distillation (BKD): soft targets weighted by how rare each class is.

    `loss_i = T^2 KL(p~_i || q_i)` with the student's `q = softmax(z_student / T)` and
    `p~_ic = w_c p_ic / sum_j w_j p_ij`: the teacher's `p = softmax(z_teacher / T)` times the inverse effective
    number of samples `w_c = (1 - beta) / (1 - beta^n_c)`, renormalised. With equal counts it is `SoftTarget`.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: Zhang, Chen, Hu, Peng, "Balanced Knowledge Distillation for Long-tailed Learning" (2021, arXiv
    2104.10510), with the weights of Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR
    2019). BKD adds cross-entropy, and its code for CIFAR-10 keeps the weights equal for the first 160 epochs; this is
    the soft term alone.

    Args:
        counts: `n_c`, training samples of each class, C positive numbers.
        temperature: `T > 0`.
        beta: in `[0, 1)`; 0 weights all classes alike, towards 1 the weights become `1 / n_c`.

    Raises:
        MetaKDError: counts are not positive finite numbers, `temperature` is not positive and finite, `beta` is outside
            `[0, 1)`; in a call, there are not C logits, or the teacher's outputs are missing or differ in shape from
            the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import RebalancedSoftTarget
        >>> batch = Batch(None, teacher=torch.tensor([[2.0, 0.0]]))
        >>> RebalancedSoftTarget([900, 100], temperature=1.0)(torch.tensor([[2.0, 0.0]]), batch)
        tensor([0.5155])
    """

    counts: Sequence[float] | Tensor = field(repr=False)
    temperature: float = 2.0
    beta: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "counts", positive_counts(self.counts))
        if not 0.0 <= self.beta < 1.0:
            raise MetaKDError(f"beta is {self.beta}, but must be in [0, 1); 0.9999 is the usual choice")

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        log_weights = self._log_weights.like(student)
        teacher = softened(teacher_logits(student, batch) / self.temperature + log_weights)
        return self._divergence(of=teacher, given=softened(student, self.temperature))

    @cached_property
    def _log_weights(self) -> PerClass:
        counts = torch.tensor(self.counts, dtype=torch.float64)
        log_beta = torch.tensor(self.beta, dtype=torch.float64).log()
        return PerClass(-(-torch.expm1(counts * log_beta)).log())  # the factor 1 - beta cancels in p~
