"""AMAL: a table of weights, one row per training sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metakd._virtual.teacher import Teacher
from metakd.balancer import BilevelLossBalancer
from metakd.errors import MetaKDError
from metakd.estimators import OneStep
from metakd.recipes.base import beside, configured, hard_and_soft, rate
from metakd.weighting import SampleTable


def amal(
    student: nn.Module,
    teacher: Teacher | None,
    *,
    optimizer: torch.optim.Optimizer,
    samples: int,
    temperature: float = 4.0,
    lr: float = 1500.0,
    last_layer: Sequence[str] | None = None,
    **options: Any,
) -> BilevelLossBalancer:
    r"""AMAL: weights of label and teacher, learned for each training sample separately.

    $$\frac{1}{B} \sum_i \lambda_{i1}\, \mathrm{CE}_i + \lambda_{i2}\, T^2\, \mathrm{KL}(p_i^T \,\|\, q_i^T), \qquad
      \lambda \leftarrow \mathrm{clamp}_{[0, 2]}(\lambda - \alpha \nabla_\lambda L_\mathrm{meta})$$

    with teacher $p$, student $q$ and a free number $\lambda_{ik}$ for each training sample and term. The meta loss is
    the cross-entropy of the meta batch after one plain SGD step. A row moves when its sample is in the batch.

    Source: Sivasubramanian et al., AMAL, "Adaptive Mixing of Auxiliary Losses in Supervised Learning" (AAAI 2023, arXiv
    2202.03250) and its published code. Differences:

    - every call moves the rows of its batch once. The published code goes over all training samples every 10 epochs
      (CIFAR-100), after 10 epochs of warm-up, and takes 5 steps with three batches at a time. `balancer(batch, None)`
      is a warm-up step;
    - the lookahead moves all parameters unless `last_layer` is given (theirs: the last layer alone), and runs in the
      student's own mode (theirs: eval mode);
    - all weights start at 0.5 (theirs: a uniform random share for the teacher, the rest for the label).

    Args:
        student: any classifier.
        teacher: any classifier with the same classes, or a function that returns its logits; None if batches hold
            its outputs (`Batch(teacher=...)`).
        optimizer: the student's.
        samples: the number of training samples. Batches need each sample's position: `(inputs, targets, index)`.
        temperature: T.
        lr: $\alpha$. It is large because a weight's hypergradient contains the student's learning rate and 1/B.
        last_layer: patterns of the names of the parameters that the lookahead moves, such as `["fc.*"]`; see
            `estimators.OneStep`. None for all.
        options: other arguments of `BilevelLossBalancer`.

    Returns:
        The balancer, to be called in the loop.

    Raises:
        MetaKDError: see `BilevelLossBalancer`, `SampleTable` and `OneStep`; or an option is one that the recipe sets.

    Examples:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> balancer = amal(student, teacher, optimizer=torch.optim.SGD(student.parameters(), lr=0.1), samples=100)
        >>> batch = (torch.randn(8, 4), torch.randint(3, (8,)), torch.arange(8))
        >>> balancer(batch, (torch.randn(6, 4), torch.arange(6) % 3)).backward()
        >>> balancer.weighting.free.shape, bool((balancer.weighting.free[8:] == 0.5).all())
        (torch.Size([100, 2]), True)
    """
    parts: dict[str, Any] = {}
    if last_layer is not None:
        if isinstance(last_layer, str) or not last_layer:
            raise MetaKDError(
                f"last_layer is {last_layer!r}, but must be a list of patterns of parameter names; write ['fc.*']"
            )
        parts["estimator"] = OneStep(parameters=tuple(last_layer))
    table = beside(student, SampleTable(samples, 2, init=0.5, output="identity"))
    steps = torch.optim.SGD(table.parameters(), lr=rate(lr))
    steps.register_step_post_hook(_clamp)
    return configured(
        "amal",
        student,
        hard_and_soft(temperature),
        options,
        optimizer=optimizer,
        teacher=teacher,
        weighting=table,
        weighting_optimizer=steps,
        **parts,
    )


def _clamp(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(0.0, 2.0)
