"""Products of a vector with the inner loss's second derivatives, in params and meta: the two exact ways."""

from typing import Any

import torch
from torch.autograd import forward_ad

from metakd._autodiff import (
    Gradients,
    NoSecondDerivative,
    first_line,
    graph_gradients,
    joint_gradients,
    leaves,
    reject_once_differentiable,
    second_order_gradients,
    slope,
)
from metakd.errors import MetaKDError
from metakd.estimators.agreement import reject_other_products
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.double_backward import reject_wrong_products
from metakd.estimators.dual import LevelTaken, dual_numbers, duals
from metakd.estimators.mixed import reverse_instead
from metakd.estimators.problem import Problem
from metakd.inner import Params


def reverse_over_reverse(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    """The gradients in params and meta of the inner loss's slope along u, by a double backward."""
    theta = leaves(params)
    g = graph_gradients(twice_differentiable(lambda: problem.inner(theta, meta, batch)), theta)
    derivative = slope(g, u)
    assert derivative is not None  # u has only names that this gradient has
    found = joint_gradients(derivative, theta, meta, second_order_gradients)
    if problem.memory.compare_products:
        problem.memory.compare_products = False
        reject_wrong_products(problem, params, meta, batch, u, found)
    return found


def forward_over_reverse(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    """The tangents of a gradient that is computed with dual numbers.

    Raises:
        MetaKDError: an operation or its backward has no forward-mode derivative or a wrong one, or is marked
            @once_differentiable.
    """
    at = problem, params, meta, batch, u
    try:
        found = _tangents_of_gradients(*at)
    except (LevelTaken, NoSecondDerivative, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        reverse_instead(error, lambda: reverse_over_reverse(*at))
        raise MetaKDError(
            f"forward over reverse met an operation without a forward-mode derivative ({first_line(error)}); use "
            "estimators.Adjoint(mode='reverse')"
        ) from error
    if problem.memory.compare:
        reject_other_products(
            *at, forward=found, reverse=lambda: reverse_over_reverse(*at), what="Adjoint(mode='forward')"
        )
    return found


def _tangents_of_gradients(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Gradients, Gradients]:
    with dual_numbers():
        theta = leaves(params)
        dual = duals(theta, u)
        loss = problem.inner(dual, meta, batch)
        reject_once_differentiable(loss)
        in_params, in_meta = joint_gradients(loss, dual, meta)
        return _tangents(in_params), _tangents(in_meta)


def _tangents(values: Gradients) -> Gradients:
    return {name: None if value is None else forward_ad.unpack_dual(value).tangent for name, value in values.items()}
