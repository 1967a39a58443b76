"""BiKD: two weights per sample, from the losses of student and teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metakd._basics.positive_int import positive_int
from metakd._virtual.teacher import Teacher
from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import Sum, adam, beside, chosen, configured, hard_and_soft
from metakd.weighting import LossMLP
from metakd.weighting.features import student_and_teacher


def bikd(
    student: nn.Module,
    teacher: Teacher | None,
    *,
    optimizer: torch.optim.Optimizer,
    classes: int | None = None,
    temperature: float = 4.0,
    setting: str | None = None,
    hidden: Sequence[int] | None = None,
    accumulate: int | None = None,
    lr: float = 1e-3,
    **options: Any,
) -> BilevelLossBalancer:
    r"""BiKD: weights of label and teacher for each sample, learned on a balanced meta set.

    $$\frac{1}{B} \sum_i w_i^\mathrm{hard}\, \mathrm{CE}_i + w_i^\mathrm{soft}\, T^2\, \mathrm{KL}(p_i^T \,\|\, q_i^T),
      \qquad w_i = \sigma(\mathrm{MLP}(\mathrm{CE}_i(q), \mathrm{CE}_i(p)))$$

    with student $q$ and teacher $p$. The meta loss is the cross-entropy of the meta batch after one plain SGD step at
    the current learning rate. Adam (weight decay 1e-4) steps the MLP with the mean of every `accumulate`
    hypergradients.

    Source: Nguyen, Phan, Ta, "Balancing Knowledge Distillation for Imbalance Learning with Bilevel Optimization"
    (PAKDD 2026, arXiv 2605.17839) and its published code. The teacher here is in eval mode (theirs stays in train mode,
    so that its batch statistics drift), and the weights of the real step come from the losses of the same forward pass
    as the lookahead's. The published code multiplies the weight model's learning rate by 0.8 at each decay of the
    student's: attach a scheduler to `balancer.weighting_optimizer`. Their command for CIFAR-10 has cross-entropy plus
    divergence as meta loss, one hidden layer and k = 1: `setting="cifar10"`.

    Args:
        student: any classifier.
        teacher: any classifier with the same classes, or a function that returns its logits; None if batches hold
            its outputs (`Batch(teacher=...)`).
        optimizer: the student's.
        classes: their number, which decides the default of `hidden`.
        temperature: T.
        setting: `"cifar10"` for the published command's meta loss, `hidden` and `accumulate`, unless they are given.
        hidden: tanh layers of the MLP. Default: (64,), and (64, 64) from 100 classes on, as the authors recommend.
        accumulate: k, the hypergradients averaged for each step of the MLP; None for 5, or the setting's 1.
        lr: of the MLP.
        options: other arguments of `BilevelLossBalancer`. With other `features`, the MLP takes their width from the
            first batch.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: another setting; see `BilevelLossBalancer` and `LossMLP`; or an option is one that the recipe sets.

    Examples:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> balancer = bikd(student, teacher, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> balancer.report.weights.shape
        torch.Size([8, 2])
    """
    terms = hard_and_soft(temperature)
    as_published = chosen(setting, {None: False, "cifar10": True}, "bikd")
    if as_published:
        options.setdefault("meta_loss", Sum(list(terms.values())))
    if hidden is None:
        hidden = (64,) if as_published or classes is None or positive_int(classes, "classes") < 100 else (64, 64)
    weighting = beside(student, LossMLP(None if "features" in options else 2, 2, hidden))
    return configured(
        "bikd",
        student,
        terms,
        {"features": student_and_teacher, **options},
        optimizer=optimizer,
        teacher=teacher,
        weighting=weighting,
        weighting_optimizer=adam(weighting, lr, weight_decay=1e-4),
        accumulate=(1 if as_published else 5) if accumulate is None else accumulate,
    )
