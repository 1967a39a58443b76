"""`diagnose`: is the weight model learning, and what from?"""

import copy
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from torch.nn.parameter import is_lazy

from metakd.balancer import BilevelLossBalancer
from metakd.batch import endless
from metakd.doctor.advice import advice
from metakd.doctor.diagnosis import Diagnosis
from metakd.doctor.examine import examine
from metakd.doctor.numbers import summarised
from metakd.errors import MetaKDError, explained
from metakd.rng import RngState

__all__ = ["Diagnosis", "diagnose"]


def diagnose(
    balancer: BilevelLossBalancer,
    batches: Iterable[Any],
    meta_batches: Iterable[Any],
    *,
    number: int = 10,
    previous: Diagnosis | None = None,
) -> Diagnosis:
    """Look at a balancer as it is now: is it learning, what from, and if not, why not?

    On each of several batches it takes what a call takes, the hypergradient of one step ahead, and beside it the plain
    gradients of the training and the meta loss; nothing is stepped. From all of them it sees whether the hypergradients
    point anywhere in common, whether the weights tell samples apart, and how fast they move. It leaves no trace on
    student, optimizer, weight model and global random generators; a loader with a generator of its own moves on in it.

    It costs about four calls of the balancer a batch, so it is for every few epochs, not for every step.

    Args:
        balancer: at any time of the training; the student in train mode, as in the loop.
        batches: training batches; as the loader yields them, for the noise between them is part of the answer.
        meta_batches: meta batches, begun anew where they end.
        number: how many of the batches to look at.
        previous: an earlier diagnosis, to learn how far the weights have moved since.

    Returns:
        The numbers, and findings in plain English, each with its cure; `print` it.

    Raises:
        MetaKDError: the weight model has no parameters or has not seen a batch yet, there are fewer than two batches,
            or whatever a call of the balancer would raise before it comes to the hypergradient.

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
            f"{type(balancer.weighting).__name__} has no trainable parameters, so it learns nothing that could be "
            "diagnosed; look at balancer.report.influence"
        )
    if any(map(is_lazy, balancer.weighting.parameters())):
        raise MetaKDError("the weight model has not seen a batch yet; call the balancer once before diagnose()")
    # The optimizer of the copy steps the parameters of the copy: what a step would do, without one.
    twin = copy.deepcopy((balancer.weighting, balancer.weighting_optimizer))
    devices = {t.device for t in chain(balancer.student.parameters(), balancer.weighting.parameters())}
    generators = RngState.capture(devices)  # a loader draws from them
    try:
        with explained():
            meta = endless(meta_batches)
            visits = [examine(balancer, batch, next(meta), devices) for batch in islice(batches, number)]
            if len(visits) < 2:
                raise MetaKDError(f"diagnose needs two batches to tell signal from noise, got {len(visits)}; give more")
            numbers = summarised(balancer, visits, twin, None if previous is None else previous.parameters)
    finally:
        generators.restore()
    parameters = {name: p.detach().clone() for name, p in balancer.weighting.named_parameters() if p.requires_grad}
    return Diagnosis(numbers, parameters, advice(balancer, numbers))
