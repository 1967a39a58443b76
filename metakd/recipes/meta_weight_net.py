"""Meta-Weight-Net: a sample's weight as a learned function of its loss."""

from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.features import own_losses
from metakd.recipes.base import adam, beside, configured
from metakd.terms import CrossEntropy
from metakd.weighting import LossMLP, Normalised


def meta_weight_net(
    student: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    hidden: int = 100,
    lr: float = 1e-3,
    **options: Any,
) -> BilevelLossBalancer:
    r"""Meta-Weight-Net: one weight a sample, a learned function of its cross-entropy.

    $$\sum_i \bar w_i\, \mathrm{CE}_i, \qquad \bar w_i = \frac{w_i}{\sum_j w_j}, \qquad
      w_i = \sigma(\mathrm{MLP}(\mathrm{CE}_i))$$

    with an MLP of one hidden layer of ReLU units. The meta loss is the cross-entropy of the meta batch after one plain
    SGD step.

    Source: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (NeurIPS 2019) and its
    published code for imbalanced classes, which normalises the weights over the batch; the authors' code for noisy
    labels does not. Ours differs in the MLP's optimizer, which is that of the code for noisy labels (Adam 1e-3, weight
    decay 1e-4; the one for imbalanced classes takes SGD 1e-5 with momentum), and in that the loss is always detached
    where it enters the MLP (the code for imbalanced classes lets the lookahead's gradient through it).

    A batch of a single sample has nothing to learn from: use `DataLoader(drop_last=True)`.

    Args:
        student: any classifier.
        optimizer: the student's.
        hidden: units of the MLP's hidden layer.
        lr: of the MLP.
        options: other arguments of `BilevelLossBalancer`; the MLP takes the width of other `features` from the first
            batch.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer` and `LossMLP`; also an option that the recipe decides.

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
