"""Soft targets without the teacher's own bias towards the frequent classes."""

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
    """Soft targets from the teacher's logits after the log class prior is taken off.

    `loss_i = T^2 KL(p~_i || q_i)` with `p~ = softmax((z_teacher - tau log pi) / T)`, the student's
    `q = softmax(z_student / T)` and `pi_c = n_c / sum_c n_c`. A teacher trained by plain cross-entropy on the long
    tail holds the prior in its logits; without it they fit balanced test data, and so do the plain logits of a
    student that learns from them.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), result `(B,)`.

    Source: the adjustment is the post-hoc one of Menon et al., "Long-tail learning via logit adjustment" (ICLR
    2021); ours applies it to a teacher. `RebalancedSoftTarget` (BKD) weighs the softened probabilities instead, so
    that its correction is T times as strong in the logits.

    Args:
        counts: training samples of each class, C positive numbers `n_c`, of the set the teacher was trained on.
        temperature: `T > 0`.
        tau: strength, finite and at least 0; 0 is `SoftTarget`.

    Raises:
        MetaKDError: counts that are not positive finite numbers, `temperature` not positive and finite, `tau`
            negative or not finite; when called, other than C logits, the teacher's outputs missing or of another
            shape than the student's.

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
        """Check the settings."""
        super().__post_init__()
        counts = positive_counts(self.counts)
        object.__setattr__(self, "counts", counts)
        log_prior(counts, self.tau)  # raises where tau does not fit

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student = class_logits(outputs)
        teacher = teacher_logits(student, batch) - self._shift.like(student)
        return self._divergence(of=softened(teacher, self.temperature), given=softened(student, self.temperature))

    @cached_property
    def _shift(self) -> PerClass:
        return log_prior(positive_counts(self.counts), self.tau)
