"""RW-KD: label against teacher, decided for each sample by the hypergradient."""

from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import Sum, configured, hard_and_soft
from metakd.teacher import Teacher
from metakd.weighting import Rectified


def rw_kd(
    student: nn.Module,
    teacher: Teacher | None,
    *,
    optimizer: torch.optim.Optimizer,
    temperature: float = 4.0,
    **options: Any,
) -> BilevelLossBalancer:
    r"""RW-KD: each sample shares a weight of one between label and teacher, as much as either helps the meta set.

    $$\frac{1}{B} \sum_i (1 - \lambda_i)\, \mathrm{CE}_i + \lambda_i\, T^2\, \mathrm{KL}(p_i^T \,\|\, q_i^T), \qquad
      \lambda_i = \frac{u_i^\mathrm{soft}}{u_i^\mathrm{hard} + u_i^\mathrm{soft}}, \qquad
      u_i = \max\left(0, -\left. \frac{\partial L_\mathrm{meta}}{\partial \epsilon_i} \right|_{\epsilon = 0}\right)$$

    with teacher $p$, student $q$, and $\epsilon$ the weights of both terms in one plain SGD step. Where neither helps,
    $\lambda_i = 1/2$. The meta loss is CE + T^2 KL of the meta batch.

    Source: Lu et al., "RW-KD: Sample-wise Loss Terms Re-Weighting for Knowledge Distillation" (Findings of EMNLP 2021).
    From its abstract: a convex combination of the two losses for each sample, which a meta-learner, trained together
    with the student, re-weights. The formulas are not taken from the paper: they are what two independent
    reimplementations have in common, one of which names the paper's algorithm 1. In the meta loss those two differ: one
    takes CE + T^2 KL, the other CE unless told otherwise (`meta_loss=CrossEntropy()`). Both keep $u$ above 1e-8; ours
    is the limit of no such bound, so that the size of the learning rate does not matter. In calls without a meta batch
    $\lambda_i = 1/2$.

    Args:
        student: any classifier.
        teacher: any classifier with the same classes, or a function that gives its logits; None where batches hold
            its outputs (`Batch(teacher=...)`), those of the meta set too.
        optimizer: the student's.
        temperature: T.
        options: other arguments of `BilevelLossBalancer`.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer`; also an option that the recipe decides.

    Examples:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> balancer = rw_kd(student, teacher, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> bool(torch.allclose(balancer.report.weights.sum(1), torch.ones(8)))
        True
    """
    terms = hard_and_soft(temperature)
    return configured(
        "rw_kd",
        student,
        terms,
        {"meta_loss": Sum(list(terms.values())), **options},
        optimizer=optimizer,
        teacher=teacher,
        weighting=Rectified(2, over="sample"),
    )
