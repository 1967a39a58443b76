"""Learning to Reweight: weights computed from the hypergradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from metakd.balancer import BilevelLossBalancer
from metakd.recipes.base import configured
from metakd.terms import CrossEntropy, Term, named
from metakd.weighting import Rectified


def learning_to_reweight(
    student: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    terms: Mapping[str, Term] | Sequence[Term] | None = None,
    **options: Any,
) -> BilevelLossBalancer:
    r"""Learning to Reweight: the weight of a sample is how much a step on it alone would lower the meta loss.

    $$\sum_i w_i\, \mathrm{CE}_i, \qquad w_i = \frac{\max(0, -g_i)}{\sum_j \max(0, -g_j)}, \qquad
      g_i = \left. \frac{\partial}{\partial \epsilon_i} L_\mathrm{meta}\Big(\theta - \eta \nabla_\theta \sum_j
      \epsilon_j\, \mathrm{CE}_j\Big) \right|_{\epsilon = 0}$$

    There is no weight model, and nothing but the student is trained. If no sample helps, all weights are zero.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning" (ICML 2018). With one term it is the
    paper's rule; several terms, whose weights sum to one together, are our addition. In calls without a meta batch, for
    which the paper has no rule, all weights are equal.

    Args:
        student: any model.
        optimizer: the student's.
        terms: default cross-entropy alone.
        options: other arguments of `BilevelLossBalancer`.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer`; or an option is one that the recipe sets.

    Examples:
        >>> student = nn.Linear(4, 3)
        >>> balancer = learning_to_reweight(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> balancer(batch, meta_batch).backward()
        >>> bool((balancer.report.weights >= 0).all())
        True
    """
    chosen = named({"hard": CrossEntropy()} if terms is None else terms)
    return configured(
        "learning_to_reweight", student, chosen, options, optimizer=optimizer, weighting=Rectified(len(chosen))
    )
