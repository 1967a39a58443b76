"""`diagnose`: is the weight model learning, and what?"""

import copy
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from torch.nn.parameter import is_lazy

from metakd._basics.rng import RngState
from metakd.balancer import BilevelLossBalancer
from metakd.batch import endless
from metakd.errors import MetaKDError, explained
from metakd.monitor.doctor.advice import advice
from metakd.monitor.doctor.diagnosis import Diagnosis
from metakd.monitor.doctor.examine import examine
from metakd.monitor.doctor.numbers import summarised

__all__ = ["Diagnosis", "diagnose"]


def diagnose(
    balancer: BilevelLossBalancer,
    batches: Iterable[Any],
    meta_batches: Iterable[Any],
    *,
    number: int = 10,
    previous: Diagnosis | None = None,
) -> Diagnosis:
    """Examine a balancer in its current state: is it learning, what, and if not, why?

    For each batch it takes the hypergradient of one step ahead, as a call does, and the plain gradients of the training
    and the meta loss. Nothing is stepped. Together they show whether the hypergradients have a direction in common,
    whether the weights differ between samples, and how fast the weights move. Student, optimizer, weight model and
    global random generators are left without a trace; a loader's own generator advances.

    It costs about four calls of the balancer per batch: use it every few epochs, not at every step.

    Args:
        balancer: at any time of the training; the student in train mode, as in the loop.
        batches: training batches, as the loader yields them: the noise between them is measured.
        meta_batches: meta batches, restarted when they end.
        number: how many of the batches to use.
        previous: an earlier diagnosis, to measure how far the weights have moved since.

    Returns:
        The numbers, and findings in plain English, each with its cure; `print` it.

    Raises:
        MetaKDError: the weight model has no parameters or has not seen a batch yet, there are fewer than two batches,
            or anything that a call of the balancer raises before the hypergradient.

    Examples:
        >>> import torch
        >>> from metakd import BilevelLossBalancer, terms
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
        >>> print(diagnose(balancer, batches, batches))
        Is it learning? ...
    """
    if not any(p.requires_grad for p in balancer.weighting.parameters()):
        raise MetaKDError(
            f"{type(balancer.weighting).__name__} has no trainable parameters, so there is no learning to diagnose; "
            "look at balancer.report.influence"
        )
    if any(map(is_lazy, balancer.weighting.parameters())):
        raise MetaKDError("the weight model has not seen a batch yet; call the balancer once before diagnose()")
    # Copied together, so that the copied optimizer steps the copied parameters.
    twin = copy.deepcopy((balancer.weighting, balancer.weighting_optimizer))
    devices = {t.device for t in chain(balancer.student.parameters(), balancer.weighting.parameters())}
    generators = RngState.capture(devices)  # loaders draw from them
    try:
        with explained():
            meta = endless(meta_batches)
            visits = [examine(balancer, batch, next(meta), devices) for batch in islice(batches, number)]
            if len(visits) < 2:
                raise MetaKDError(f"diagnose needs two batches to tell signal from noise, got {len(visits)}; pass more")
            numbers = summarised(balancer, visits, twin, None if previous is None else previous.parameters)
    finally:
        generators.restore()
    parameters = {name: p.detach().clone() for name, p in balancer.weighting.named_parameters() if p.requires_grad}
    return Diagnosis(numbers, parameters, advice(balancer, numbers))
