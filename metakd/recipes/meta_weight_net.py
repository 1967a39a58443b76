"""Meta-Weight-Net: a sample's weight as a learned function of its loss."""

from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import adam, beside, configured
from metakd.terms import CrossEntropy
from metakd.weighting import LossMLP, Normalised
from metakd.weighting.features import own_losses


def meta_weight_net(
    student: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    hidden: int = 100,
    lr: float = 1e-3,
    **options: Any,
) -> BilevelLossBalancer:
    r"""Meta-Weight-Net: one weight per sample, a learned function of its cross-entropy.

    $$\sum_i \bar w_i\, \mathrm{CE}_i, \qquad \bar w_i = \frac{w_i}{\sum_j w_j}, \qquad
      w_i = \sigma(\mathrm{MLP}(\mathrm{CE}_i))$$

    with an MLP of one hidden layer of ReLU units. The meta loss is the cross-entropy of the meta batch after one plain
    SGD step.

    Source: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (NeurIPS 2019). The authors
    published two codes. Like the one for imbalanced classes, this recipe normalises the weights over the batch; like
    the one for noisy labels, it steps the MLP with Adam (1e-3, weight decay 1e-4; for imbalanced classes they use SGD
    1e-5 with momentum). The loss that enters the MLP is always detached (the code for imbalanced classes lets the
    lookahead's gradient through it).

    A batch of one sample has nothing to learn from: use `DataLoader(drop_last=True)`.

    Args:
        student: any classifier.
        optimizer: the student's.
        hidden: units of the MLP's hidden layer.
        lr: of the MLP.
        options: other arguments of `BilevelLossBalancer`. With other `features`, the MLP takes their width from the
            first batch.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer` and `LossMLP`; or an option is one that the recipe sets.

    Examples:
        >>> student = nn.Linear(4, 3)
        >>> balancer = meta_weight_net(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> round(balancer.report.weights.mean().item(), 4)
        1.0
    """
    width = None if "features" in options else 1
    weighting = beside(student, Normalised(LossMLP(width, 1, (hidden,), activation=nn.ReLU)))
    return configured(
        "meta_weight_net",
        student,
        {"hard": CrossEntropy()},
        {"features": own_losses, **options},
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=adam(weighting, lr, weight_decay=1e-4),
    )
