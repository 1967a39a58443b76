"""Soft targets without the teacher's bias towards frequent classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from metakd.batch import Batch
from metakd.terms.counts import PerClass, log_prior, positive_counts
from metakd.terms.reading import class_logits, teacher_logits
from metakd.terms.softened import Softened, softened


@dataclass(frozen=True)
class DebiasedSoftTarget(Softened):
    """Soft targets from the teacher's logits minus the log class prior.

    `loss_i = T^2 KL(p~_i || q_i)` with `p~ = softmax((z_teacher - tau log pi) / T)`, the student's
    `q = softmax(z_student / T)` and `pi_c = n_c / sum_c n_c`. The logits of a teacher trained with cross-entropy on
    a long tail include the log prior. Subtracting it fits the teacher's logits, and those of its student, to
    balanced test data.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021) adjust logits this way after training;
    here the adjustment is applied to a teacher. `RebalancedSoftTarget` (BKD) reweights the softened probabilities
    instead, which is a T times stronger correction of the logits.

    Args:
        counts: `n_c`, C positive numbers: samples of each class in the teacher's training set.
        temperature: `T > 0`.
        tau: strength, finite and at least 0; 0 is `SoftTarget`.

    Raises:
        MetaKDError: counts are not positive finite numbers, `temperature` is not positive and finite, `tau` is
            negative or not finite; in a call, there are not C logits, or the teacher's outputs are missing or differ
            in shape from the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import DebiasedSoftTarget
        >>> biased = torch.tensor([[0.9, 0.1]]).log()  # the teacher knows nothing but the prior
        >>> DebiasedSoftTarget([90, 10], temperature=1.0)(torch.zeros(1, 2), Batch(None, teacher=biased))
        tensor([0.])
    """

    counts: Sequence[float] | Tensor = field(repr=False)
    temperature: float = 4.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = positive_counts(self.counts)
        object.__setattr__(self, "counts", counts)
        log_prior(counts, self.tau)  # raises if tau is invalid

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        teacher = teacher_logits(student, batch) - self._shift.like(student)
        return self._divergence(of=softened(teacher, self.temperature), given=softened(student, self.temperature))

    @cached_property
    def _shift(self) -> PerClass:
        return log_prior(positive_counts(self.counts), self.tau)
