"""Meta-Weight-Net: a sample's weight as a learned function of its loss."""

from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import adam, beside, chosen, configured, rate
from metakd.terms import CrossEntropy
from metakd.weighting import LossMLP, Normalised
from metakd.weighting.features import own_losses


def meta_weight_net(
    student: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    setting: str = "imbalance",
    hidden: int = 100,
    lr: float | None = None,
    **options: Any,
) -> BilevelLossBalancer:
    r"""Meta-Weight-Net: one weight per sample, a learned function of its cross-entropy.

    $$\frac{1}{B} \sum_i \bar w_i\, \mathrm{CE}_i, \qquad w_i = \sigma(\mathrm{MLP}(\mathrm{CE}_i)), \qquad
      \bar w_i = \frac{B\, w_i}{\sum_j w_j} \;\text{(imbalance)} \quad\text{or}\quad w_i \;\text{(noise)}$$

    with an MLP of one hidden layer of ReLU units. The meta loss is the cross-entropy of the meta batch after one plain
    SGD step.

    Source: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (NeurIPS 2019). The authors
    published two codes, and a setting follows one of them. `"imbalance"` normalises the weights over the batch and
    steps the MLP by SGD (1e-5, Nesterov momentum 0.9, weight decay 5e-4); `"noise"` does not normalise and steps it by
    Adam (1e-3, weight decay 1e-4). The loss that enters the MLP is always detached (the code for imbalanced classes
    lets the lookahead's gradient through it).

    Expect little of `"imbalance"`: at 1e-5 the weights stay near 1. Do not raise its rate: from the loss alone a rare
    class looks like a hard or mislabelled sample, and normalised weights that do move tend to take the wrong side. If
    the class counts are known, let the MLP see them, with Adam: see [recipes](recipes.md#meta-weight-net).

    With normalised weights a batch of one sample has nothing to learn from: use `DataLoader(drop_last=True)`.

    Args:
        student: any classifier.
        optimizer: the student's.
        setting: `"imbalance"` or `"noise"`, the published code to follow.
        hidden: units of the MLP's hidden layer.
        lr: of the MLP; None for the setting's.
        options: other arguments of `BilevelLossBalancer`. With other `features`, the MLP takes their width from the
            first batch.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: another setting; see `BilevelLossBalancer` and `LossMLP`; or an option is one that the recipe sets.

    Examples:
        >>> student = nn.Linear(4, 3)
        >>> balancer = meta_weight_net(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> round(balancer.report.weights.mean().item(), 4)
        1.0
    """
    normalised = chosen(setting, {"imbalance": True, "noise": False}, "meta_weight_net")
    mlp = LossMLP(None if "features" in options else 1, 1, (hidden,), activation=nn.ReLU)
    weighting = beside(student, Normalised(mlp) if normalised else mlp)
    return configured(
        "meta_weight_net",
        student,
        {"hard": CrossEntropy()},
        {"features": own_losses, **options},
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=_published_sgd(weighting, 1e-5 if lr is None else lr)
        if normalised
        else adam(weighting, 1e-3 if lr is None else lr, weight_decay=1e-4),
    )


def _published_sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """The optimizer of the MLP in the code for imbalanced classes."""
    return torch.optim.SGD(model.parameters(), rate(lr), momentum=0.9, nesterov=True, weight_decay=5e-4)
