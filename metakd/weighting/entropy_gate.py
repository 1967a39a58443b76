"""A fixed gate between forward and reverse divergence, by the entropies of teacher and student."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import class_logits, teacher_logits


def entropies(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """Entropies of the student's and the teacher's class probabilities, in nats: the features of `EntropyGate`.

    `H(p) = -sum_c p_c log p_c`. Shapes: outputs and `batch.teacher` `(B, C)`, result `(B, 2)`, the student first.

    Args:
        losses: not used.
        outputs: the student's logits.
        batch: with the teacher's logits.

    Returns:
        The entropies.

    Raises:
        MetaKDError: outputs are not logits, or the teacher's are missing or differ in shape.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> batch = Batch(None, teacher=torch.tensor([[9.0, 0.0]]))
        >>> entropies(torch.zeros(1, 3), torch.zeros(1, 2), batch)
        tensor([[0.6931, 0.0012]])
    """
    student = class_logits(outputs)
    return torch.stack([entropy(z) for z in (student, teacher_logits(student, batch))], dim=1)


def entropy(z: Tensor) -> Tensor:
    """Return the entropy of each row of logits `(B, C)`, in nats."""
    found: Tensor = torch.special.entr(z.softmax(dim=1)).sum(dim=1)
    return found


class EntropyGate(nn.Module):
    """A larger weight for reverse divergence where the student is less certain than the teacher, else for forward.

    Three terms (hard, soft, reverse) get the weights `(1, low, high)` where the student's entropy is above the
    teacher's, and `(1, high, low)` elsewhere. The gate has no parameters and learns nothing: use
    `balancer.loss(batch)`.

    Shapes: features `(B, 2)`, the entropies of student and teacher as `entropies` returns them; result `(B, 3)`.

    Source: Amara et al., BD-KD (2022, arXiv 2212.12965), whose student minimises
    `CE + T^2 (nu_i KL(p || q) + delta_i KL(q || p))`, where a comparison of the entropies of teacher `p` and student
    `q` sets `nu_i` and `delta_i`. This much is taken from the abstract and from summaries of the paper. The direction
    of the gate, its two values and entropies without a temperature are our choices. The paper also trains the teacher.

    Args:
        low: the smaller weight of the two divergences, not negative.
        high: the larger one.

    Raises:
        MetaKDError: not `0 <= low <= high`; in a call, features are not `(B, 2)`.

    Examples:
        >>> import torch
        >>> from metakd import Batch, BilevelLossBalancer
        >>> from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget
        >>> from metakd.weighting import EntropyGate, entropies
        >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> balancer = BilevelLossBalancer(
        ...     student, {"hard": CrossEntropy(), "soft": SoftTarget(), "reverse": ReverseSoftTarget()},
        ...     optimizer=torch.optim.SGD(student.parameters(), lr=0.1), teacher=teacher,
        ...     weighting=EntropyGate(), features=entropies)
        >>> balancer.loss((torch.randn(8, 4), torch.randint(3, (8,)))).backward()
        >>> EntropyGate()(torch.tensor([[0.6, 0.1], [0.1, 0.6]]), Batch(None))
        tensor([[1., 1., 2.],
                [1., 2., 1.]])
    """

    def __init__(self, low: float = 1.0, high: float = 2.0) -> None:
        super().__init__()
        if not 0.0 <= low <= high < math.inf:
            raise MetaKDError(
                f"EntropyGate needs 0 <= low <= high, finite, got low={low} and high={high}; swap or raise them"
            )
        self.low, self.high = low, high

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights of the hard, the soft and the reverse term, shape `(B, 3)`."""
        if features.ndim != 2 or features.shape[1] != 2:
            raise MetaKDError(
                f"the features have shape {tuple(features.shape)}, expected (B, 2): the entropies of student and "
                "teacher; pass features=weighting.entropies to the balancer"
            )
        uncertain = features[:, 0] > features[:, 1]
        soft, reverse = torch.where(uncertain, self.low, self.high), torch.where(uncertain, self.high, self.low)
        return torch.stack([torch.ones_like(soft), soft, reverse], dim=1).to(features.dtype)
