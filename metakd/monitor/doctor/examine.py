"""The measurements of a diagnosis on one training batch and one meta batch."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakd._autodiff import norm, slope
from metakd._basics.rng import RngState
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.estimators.estimate import estimate
from metakd.inner import Params
from metakd.monitor.learned_weights import first_answer


class Visit(NamedTuple):
    """The measurements on one training batch and one meta batch.

    Attributes:
        hypergradient: by name of the weight model's parameter; or the reason why there is none.
        cosine: between the gradients of the weighted training loss and of the meta loss, before the step.
        before: the meta loss before the step ahead.
        after: the meta loss after it.
        length: of the step ahead, relative to the student's parameters.
        features: what the weight model saw.
        batch: what the weight model saw.
        weights: (B, M).
    """

    hypergradient: Params | str
    cosine: float
    before: float
    after: float
    length: float
    features: Tensor
    batch: Batch
    weights: Tensor


def examine(balancer: BilevelLossBalancer, batch: Any, meta_batch: Any, devices: Iterable[torch.device]) -> Visit:
    """Measure what a call of the balancer on these batches would compute, on this process's samples.

    It leaves a trace in the devices' random generators only.
    """
    with first_answer(balancer.weighting) as seen, balancer.problem([batch], meta_batch) as problem:
        theta = problem.params
        gradient = problem.inner_gradient(theta, 0)
        before, meta_gradient, _ = problem.outer_gradients(theta)
        ahead, _ = problem.sweep()
        after, _, _ = problem.outer_gradients(ahead)
        try:
            found = estimate(balancer.estimator, problem).gradient
            hypergradient: Params | str = found if any(bool(g.any()) for g in found.values()) else _ZERO
        except MetaKDError as error:
            hypergradient = str(error)
        reached = RngState.capture(devices)
    reached.restore()  # the next batch draws other numbers, as in training
    dot = slope(gradient, meta_gradient)
    lengths = norm(gradient.values()) * norm(meta_gradient.values())
    return Visit(
        hypergradient,
        0.0 if dot is None or lengths == 0 else float(dot) / lengths,
        float(before),
        float(after),
        norm(ahead[name] - p for name, p in theta.items()) / max(norm(theta.values()), 1e-30),
        *seen[0],
    )


_ZERO = (
    "it is exactly zero: either the meta loss does not depend on the step ahead (an inner learning rate of 0, a flat "
    "meta loss), or the weights do not depend on the weight model (a saturated output)"
)
