"""Products of a vector with the inner loss's second derivatives: the two exact ways, and the faster of them."""

import time
import warnings
from typing import Any

import torch
from torch.autograd import forward_ad

from metakd.derivatives import (
    Gradients,
    graph_gradients,
    in_both,
    leaves,
    reject_once_differentiable,
    second_order_gradients,
    slope,
)
from metakd.errors import MetaKDError
from metakd.estimators.mixed import dual_numbers, duals, first_line, lacks_forward_mode
from metakd.estimators.problem import Problem
from metakd.inner import Params

_TRIALS = 2  # of each way; the first use of forward mode compiles its decompositions


def reverse_over_reverse(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    """The gradients, in params and in meta, of the slope of the inner loss along u: a double backward.

    Raises:
        MetaKDError: the model has no second derivatives.
    """
    theta = leaves(params)
    g = graph_gradients(problem.inner(theta, meta, batch), theta)
    derivative = slope(g, u)
    assert derivative is not None  # u is the cotangent of what this gradient has
    return in_both(derivative, theta, meta, second_order_gradients)


def forward_over_reverse(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    """The tangents of a gradient that is taken with dual numbers.

    Raises:
        MetaKDError: an operation or its backward has no forward-mode derivative, or is marked @once_differentiable.
    """
    try:
        with dual_numbers():
            theta = leaves(params)
            dual = duals(theta, u)
            loss = problem.inner(dual, meta, batch)
            reject_once_differentiable(loss)
            in_params, in_meta = in_both(loss, dual, meta)
            return _tangents(in_params), _tangents(in_meta)
    except (RuntimeError, MetaKDError) as error:
        if not lacks_forward_mode(error):
            raise
        raise MetaKDError(
            f"forward over reverse met an operation without a forward-mode derivative ({first_line(error)}); use "
            "estimators.Adjoint(mode='reverse')"
        ) from error


def faster_of_both(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    """Whichever of the two was faster on this problem; the first calls try both in turn, the memory keeps the times.

    Where there is no forward mode, reverse mode takes its place with one warning.
    """
    seconds: dict[str, list[float]] = problem.memory.setdefault("second_order_seconds", {way: [] for way in WAYS})
    chosen = min(seconds, key=lambda way: (len(seconds[way]) >= _TRIALS, min(seconds[way], default=0.0)))
    started = _now(params)
    try:
        products = WAYS[chosen](problem, params, meta, batch, u)
    except MetaKDError as error:
        if chosen == "reverse" or not lacks_forward_mode(error):
            raise
        del seconds["forward"]
        warnings.warn(
            f"forward over reverse fails here ({first_line(error)}); reverse mode takes its place from now on, as "
            "exact (Adjoint(mode='reverse') does so without a warning)",
            stacklevel=3,
        )
        return reverse_over_reverse(problem, params, meta, batch, u)
    if len(seconds[chosen]) < _TRIALS:
        seconds[chosen].append(_now(params) - started)
    return products


WAYS = {"forward": forward_over_reverse, "reverse": reverse_over_reverse}


def _now(params: Params) -> float:
    """The time, after all work on the parameters' devices is done."""
    for device in {p.device for p in params.values()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


def _tangents(values: Gradients) -> Gradients:
    return {name: None if value is None else forward_ad.unpack_dual(value).tangent for name, value in values.items()}
