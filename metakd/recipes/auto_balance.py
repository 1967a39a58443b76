"""AutoBalance: logit offsets and scales for each class, learned."""

from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import adam, beside, configured
from metakd.terms import VectorScaled
from metakd.weighting import TermScalars


def auto_balance(
    student: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    classes: int,
    lr: float = 1e-2,
    **options: Any,
) -> BilevelLossBalancer:
    r"""AutoBalance: the loss function itself is learned, as an offset and a scale of each class's logit.

    $$\frac{1}{B} \sum_i \mathrm{CE}(\sigma(a) \odot z_i + o, y_i), \qquad
      (a, o) \leftarrow \mathrm{Adam}\big((a, o), \nabla_{(a, o)} L_\mathrm{meta}(\theta'(a, o))\big)$$

    with logits $z$, scales $\sigma(a)$ that start at $\sigma(1)$ and offsets $o$ that start at 0, as published. All
    weights are 1, and nothing else is learned. The meta loss is the cross-entropy of plain logits.

    Source: Li et al., "AutoBalance: Optimized Loss Functions for Imbalanced Data" (NeurIPS 2021) and its published code
    for CIFAR-LT. The hypergradient here is that of the next step, in every call (theirs: five terms of a Neumann series
    on ten batches, every 30 iterations), stepped by Adam (theirs: SGD 0.01 with momentum 0.9 and decay 1e-4). Their
    meta set is as imbalanced as the training set and its loss weighted by class; here a meta set is balanced, or takes
    such a `meta_loss`. They start to learn after 120 of 300 epochs: pass `meta_batch=None` until then. They train a
    second network with the learned offsets and scales; `balancer.terms["scaled"]` has them.

    Args:
        student: any classifier.
        optimizer: the student's.
        classes: C.
        lr: of offsets and scales.
        options: other arguments of `BilevelLossBalancer`.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer` and `VectorScaled`; or an option is one that the recipe sets.

    Examples:
        >>> student = nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = auto_balance(student, optimizer=optimizer, classes=3)
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> balancer.terms["scaled"].offset.abs().round(decimals=3)
        tensor([0.0100, 0.0100, 0.0100], grad_fn=<RoundBackward1>)
    """
    term = beside(student, VectorScaled(classes))
    weighting = beside(student, TermScalars(1, init=1.0, output="identity")).requires_grad_(False)
    return configured(
        "auto_balance",
        student,
        {"scaled": term},
        options,
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=adam(term, lr),
    )
