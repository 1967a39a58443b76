"""Distillation between and within the head, medium and tail classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.terms.counts import PerClass, positive_counts, thirds
from metakd.terms.reading import class_logits, teacher_logits
from metakd.terms.softened import Softened, floored, log_masses, softened


class _Grouped(Softened):
    """The counts and their groups, shared by both terms."""

    counts: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = positive_counts(self.counts)
        object.__setattr__(self, "counts", counts)
        thirds(counts)  # raises if there are too few

    def _by_group(self, outputs: Any, batch: Batch) -> list[tuple[Tensor, ...]]:
        """For student and teacher, the softened logits `(B, C_g)` of head, medium and tail."""
        student = class_logits(outputs)
        order = self._order.like(student)
        sizes = [len(group) for group in self._groups]
        return [
            floored(z / self.temperature)[:, order].split(sizes, dim=1)
            for z in (student, teacher_logits(student, batch))
        ]

    @cached_property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return thirds(positive_counts(self.counts))

    @cached_property
    def _order(self) -> PerClass:
        return PerClass(torch.tensor([c for group in self._groups for c in group]))


@dataclass(frozen=True)
class GroupTarget(_Grouped):
    """Distillation between groups (LTKD): divergence of head, medium and tail masses, with the teacher's rebalanced.

    `loss_i = T^2 sum_G p~_iG log(p~_iG / q_iG)` over the three groups, with the student's mass
    `q_iG = sum_{c in G} q_ic`. The teacher's masses are scaled so that every group has the same sum over the batch:
    `p~_iG = (p_iG / S_G) / sum_H (p_iH / S_H)` with `S_G = sum_i p_iG`. `p` and `q` are softmaxes at temperature `T`.
    The groups are the 33/34/33 % of the classes with the most, middling and fewest training samples.

    **This term couples the samples of a batch**, through the teacher only: a sample's loss depends on the teacher's
    outputs for the other samples, but not on the student's. Splitting a batch therefore changes the losses, and a
    batch of one sample has `p~ = (1/3, 1/3, 1/3)`. A group without teacher mass in the whole batch (masked classes) is
    not scaled up.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), C at least 3, result `(B,)`.

    Source: Kim, "Distilling Balanced Knowledge from a Biased Teacher" (CVPR 2026, arXiv 2506.18496), called LTKD.
    The split into two parts and the calibration of the teacher's group masses are from the paper's abstract, equal
    batch sums and the 33/34/33 % groups from a summary of the paper. Renormalising each sample after the scaling
    (which makes the sums only nearly equal), the factor `T^2` and the order of equal counts are our choices.

    Args:
        counts: training samples of each class, C positive numbers.
        temperature: `T > 0`.

    Raises:
        MetaKDError: there are fewer than three counts, counts are not positive finite numbers, `temperature` is not
            positive and finite; in a call, there are not C logits, or the teacher's outputs are missing or differ in
            shape from the student's.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import GroupTarget
        >>> teacher = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0]])  # prefers the head for every sample
        >>> GroupTarget([90, 9, 1], temperature=1.0)(torch.zeros(2, 3), Batch(None, teacher=teacher))
        tensor([0.1249, 0.0353])
    """

    counts: Sequence[float] | Tensor = field(repr=False)
    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student, teacher = (log_masses(parts) for parts in self._by_group(outputs, batch))
        sums = teacher.logsumexp(dim=0).clamp(min=math.log(torch.finfo(teacher.dtype).tiny))
        return self._divergence(of=softened(teacher - sums), given=student)


@dataclass(frozen=True)
class WithinGroupTarget(_Grouped):
    """Distillation within groups (LTKD): the divergences inside head, medium and tail, equally weighted.

    `loss_i = T^2 sum_G KL(p_i|G || q_i|G)` over the three groups of `GroupTarget`, with the teacher's `p_i|G` and the
    student's `q_i|G` the softmax of `z / T` over the classes of the group. Plain distillation weights each group by
    the teacher's mass in it, so the head dominates.

    Shapes: outputs and `batch.teacher` `(B, C)` (tensors or objects with `.logits`), C at least 3, result `(B,)`.

    Source: Kim, "Distilling Balanced Knowledge from a Biased Teacher" (CVPR 2026, arXiv 2506.18496), called LTKD.
    Equal contributions of the groups are from the paper's abstract, the sum over 33/34/33 % groups from a summary of
    the paper. The factor `T^2` and the order of equal counts are our choices.

    Args:
        counts: training samples of each class, C positive numbers.
        temperature: `T > 0`.

    Raises:
        MetaKDError: as `GroupTarget`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import WithinGroupTarget
        >>> teacher = torch.tensor([[5.0, 3.0, 1.0, 0.0]])  # the two medium classes are 1 and 2
        >>> WithinGroupTarget([90, 9, 8, 1], temperature=1.0)(torch.zeros(1, 4), Batch(None, teacher=teacher))
        tensor([0.3278])
    """

    counts: Sequence[float] | Tensor = field(repr=False)
    temperature: float = 4.0

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        student, teacher = ([softened(part) for part in parts] for parts in self._by_group(outputs, batch))
        divergences = [self._divergence(of=p, given=q) for p, q in zip(teacher, student, strict=True)]
        return torch.stack(divergences).sum(dim=0)
