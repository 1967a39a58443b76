"""Auto-lambda: one weight per task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.errors import MetaKDError
from metakd.recipes.base import Sum, adam, beside, configured
from metakd.terms import Term, named
from metakd.weighting import TermScalars


def auto_lambda(
    student: nn.Module,
    terms: Mapping[str, Term] | Sequence[Term],
    *,
    optimizer: torch.optim.Optimizer,
    primary: str | Sequence[str],
    lr: float = 1e-4,
    **options: Any,
) -> BilevelLossBalancer:
    r"""Auto-lambda: one weight per task, learned so that the primary tasks improve.

    $$\sum_k \lambda_k L_k, \qquad \lambda \leftarrow \mathrm{Adam}\Big(\lambda, \nabla_\lambda \sum_{k \in
      \mathrm{primary}} L_k^\mathrm{meta}(\theta')\Big)$$

    with $L_k$ the mean of term k over the batch, and $\theta'$ the student after its own optimizer's next step. The
    weights start at 0.1 and are free: nothing keeps them positive.

    Source: Liu et al., "Auto-Lambda: Disentangling Dynamic Task Relationships" (TMLR 2022) and its published code. The
    hypergradient here is exact (theirs: central finite differences along the outer gradient). The lookahead follows the
    rule of any optimizer (theirs: SGD with momentum and weight decay, for which both agree). The meta batch is whatever
    the loop passes (theirs: the training data in another order).

    Args:
        student: any model.
        terms: one for each task.
        optimizer: the student's.
        primary: the name of the primary task, or several names, whose terms the meta loss sums. All names give plain
            multi-task learning.
        lr: of the weights.
        options: other arguments of `BilevelLossBalancer`.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: `primary` names no term; see also `BilevelLossBalancer`; or an option is one that the recipe sets.

    Examples:
        >>> student = nn.Linear(4, 2)
        >>> tasks = {"left": lambda z, batch: (z[:, 0] - batch.targets) ** 2, "right": lambda z, batch: z[:, 1] ** 2}
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        >>> balancer = auto_lambda(student, tasks, optimizer=optimizer, primary="left")
        >>> balancer((torch.randn(8, 4), torch.randn(8)), (torch.randn(8, 4), torch.randn(8))).backward()
        >>> balancer.report.weights.shape
        torch.Size([8, 2])
    """
    tasks = named(terms)
    names = [primary] if isinstance(primary, str) else list(primary)
    if not names or not set(names) <= set(tasks):
        raise MetaKDError(f"primary is {primary!r}, but must name one or more of the terms {', '.join(tasks)}")
    weighting = beside(student, TermScalars(len(tasks), init=0.1, output="identity"))
    return configured(
        "auto_lambda",
        student,
        tasks,
        {"inner": "mirror", **options},
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=adam(weighting, lr),
        meta_loss=tasks[names[0]] if len(names) == 1 else Sum([tasks[name] for name in names]),
    )
