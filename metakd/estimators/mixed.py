"""The mixed second derivative of the inner loss, times a vector: the heart of every exact estimator."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metakd._autodiff import (
    Gradients,
    NoSecondDerivative,
    first_line,
    gradients,
    graph_gradients,
    leaves,
    second_order_gradients,
    slope,
)
from metakd.errors import MetaKDError
from metakd.estimators.agreement import reject_other_products
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.double_backward import reject_wrong_influence, reject_wrong_products
from metakd.estimators.dual import LevelTaken, dual_numbers, duals
from metakd.estimators.influence import in_weights, influence
from metakd.estimators.problem import Problem
from metakd.estimators.verification import compare_influence
from metakd.estimators.walk import Products
from metakd.inner import Params

Mode = Literal["auto", "forward", "reverse"]
_T = TypeVar("_T")


def mixed_alone(mode: Mode = "auto") -> Products:
    """The mixed product without the one in the parameters: nothing before the first step asks for that."""
    return lambda problem, params, meta, batch, u: ({}, mixed_product(problem, params, meta, batch, u, mode=mode))


def mixed_product(problem: Problem, params: Params, meta: Params, batch: Any, u: Params, *, mode: Mode) -> Gradients:
    """grad_phi of the directional derivative of the inner loss along u, with u held fixed.

    Args:
        problem: gives the inner loss, and remembers whether it has forward-mode derivatives.
        params: theta, where the derivative is taken; detached.
        meta: phi, leaves of autograd.
        batch: of the inner loss.
        u: the direction, for those parameters that it moves.
        mode: `"forward"` is one pass with dual numbers, `"reverse"` a double backward. `"auto"` is the first for a
            problem that is `weighted` and whose model has it, saying so once where it does not, and else the second:
            where meta-parameters meet more than a product, torch's tangents may be constants to reverse mode.

    Raises:
        MetaKDError: the model lacks what the mode needs.
    """
    at = problem, params, meta, batch, u
    if mode == "reverse" or (mode == "auto" and (problem.weighted is None or problem.memory.forward_mode is False)):
        return _reverse(*at)
    try:
        if problem.weighted is None:
            found = _through_tangent(*at)
        else:
            tangent = _compared_influence(problem, params, batch, u)
    except LevelTaken:
        if mode == "forward":
            raise
        return _reverse(*at)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        problem.memory.compare = problem.memory.compare or isinstance(error, _WrongTangents)
        instead = in_its_place(error, lambda: _reverse(*at))
        lacks = f"an operation of this model has no forward-mode derivative ({first_line(error)})"
        what = str(error) if isinstance(error, _WrongTangents) else lacks
        if mode == "forward":
            raise MetaKDError(f"OneStep(mode='forward') fails: {what}; use mode='auto' or 'reverse'") from error
        problem.memory.forward_mode = False
        warnings.warn(
            f"{what}; reverse mode takes its place from now on, as exact, with more time and memory "
            "(OneStep(mode='reverse') does so in silence)",
            stacklevel=3,
        )
        return instead
    if problem.weighted is not None:
        return in_weights(problem.weighted, meta, batch, tangent)
    if problem.memory.compare:
        reject_other_products(
            *at, forward=({}, found), reverse=lambda: ({}, _reverse(*at)), what="OneStep(mode='forward')"
        )
    return found


class _WrongTangents(MetaKDError):
    """Forward mode answers something else than reverse mode."""


def in_its_place(error: Exception, reverse: Callable[[], _T]) -> _T:
    """What reverse mode answers after forward mode failed: an error of the losses themselves comes up here again.

    Raises:
        MetaKDError: reverse mode has no derivative either.
    """
    try:
        return reverse()
    except NoSecondDerivative as second:
        raise MetaKDError(
            f"this model has neither a forward-mode derivative ({first_line(error)}) nor a second derivative "
            f"({second.fact}); {second.advice}"
        ) from second


def _compared_influence(problem: Problem, params: Params, batch: Any, u: Params) -> Tensor:
    """The losses' directional derivatives along u, compared with reverse mode where that is asked for.

    Raises:
        _WrongTangents: the two differ.
    """
    assert problem.weighted is not None
    tangent = influence(problem.weighted, params, batch, u)
    if problem.memory.compare:
        problem.memory.compare = False
        found = compare_influence(problem, params, batch, u, tangent)
        if found is not None:
            raise _WrongTangents(f"forward mode is wrong on this model, {found}")
    return tangent


def _through_tangent(problem: Problem, params: Params, meta: Params, batch: Any, u: Params) -> Gradients:
    """Reverse mode through the whole inner loss's tangent; for those who say that theirs can be differentiated."""
    with dual_numbers():
        loss = problem.inner(duals(params, u), meta, batch)
        derivative = forward_ad.unpack_dual(loss).tangent
    # Outside of the block, where the backward pass has no tangents to carry along.
    return dict.fromkeys(meta) if derivative is None else gradients(derivative, meta)


def _reverse(problem: Problem, params: Params, meta: Params, batch: Any, u: Params) -> Gradients:
    if problem.weighted is not None and problem.memory.compare:
        problem.memory.compare = False
        reject_wrong_influence(problem, params, batch, u)
    moved = leaves({name: params[name] for name in u})
    loss = twice_differentiable(lambda: problem.inner({**params, **moved}, meta, batch))
    g = graph_gradients(loss, moved)
    derivative = slope(g, u)
    found = dict.fromkeys(meta) if derivative is None else second_order_gradients(derivative, meta)
    if problem.weighted is None and problem.memory.compare_products:
        problem.memory.compare_products = False
        reject_wrong_products(problem, params, meta, batch, u, ({}, found))
    return found
