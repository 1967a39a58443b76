"""Features that tell a rare class from a hard sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.terms import CrossEntropy
from metakd.terms.counts import PerClass, positive_counts
from metakd.terms.reading import class_indices, class_logits, teacher_logits
from metakd.weighting.entropy_gate import entropy


class ClassAware:
    """Features for long-tailed data: losses and entropies of student and teacher, and the rarity of the label's class.

    `x_i = (CE_i(q), CE_i(p), H(q_i), H(p_i), log(n_max / n_{y_i}))` with student `q`, teacher `p`, entropies `H` in
    nats, `n_c` training samples of class c, and `n_max` of the most frequent class. Without teacher outputs,
    `x_i = (CE_i(q), H(q_i), log(n_max / n_{y_i}))`.

    Shapes: outputs and `batch.teacher` `(B, C)`, `batch.targets` `(B,)`, result `(B, 5)`, without a teacher `(B, 3)`.

    Source: the two losses are the input of BiKD's weight model (PAKDD 2026, arXiv 2605.17839). The rest is our
    addition: from the losses alone a rare class looks like a hard sample.

    Args:
        counts: training samples of each class, in label order.

    Raises:
        MetaKDError: counts are not positive finite numbers; in a call, outputs are not logits with one column per
            count, the teacher's differ in shape, or targets are not labels in range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> batch = Batch(None, targets=torch.tensor([0, 1]), teacher=torch.zeros(2, 2))
        >>> ClassAware([100, 10])(torch.zeros(2, 2), torch.zeros(2, 2), batch)
        tensor([[0.6931, 0.6931, 0.6931, 0.6931, 0.0000],
                [0.6931, 0.6931, 0.6931, 0.6931, 2.3026]])
    """

    def __init__(self, counts: Sequence[float] | Tensor) -> None:
        self.counts = positive_counts(counts)
        numbers = torch.tensor(self.counts, dtype=torch.float64)
        self._rarity = PerClass((numbers.max() / numbers).log())
        self._cross_entropy = CrossEntropy()

    def __call__(self, losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
        """Return the features, shape `(B, 5)`, or `(B, 3)` without a teacher."""
        student = class_logits(outputs)
        rarity = self._rarity.like(student)
        both = [student] if batch.teacher is None else [student, teacher_logits(student, batch)]
        hard = [self._cross_entropy(z, batch) for z in both]
        return torch.stack([*hard, *map(entropy, both), rarity[class_indices(student, batch)]], dim=1)
