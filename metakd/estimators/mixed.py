"""The product of a vector with the mixed second derivative of the inner loss: the core of every exact estimator."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metakd._autodiff import (
    Gradients,
    NoSecondDerivative,
    added,
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
from metakd.estimators.influence import influence
from metakd.estimators.problem import Problem, WeightedLosses
from metakd.estimators.through_terms import ThroughTerms
from metakd.estimators.tolerance import full_float32
from metakd.estimators.verification import compare_influence
from metakd.estimators.walk import Products
from metakd.inner import Params

Mode = Literal["auto", "forward", "reverse"]
_T = TypeVar("_T")


def mixed_alone(mode: Mode = "auto") -> Products:
    """The mixed product without the one in params, which the earliest step does not need."""
    return lambda problem, params, meta, batch, u: ({}, mixed_product(problem, params, meta, batch, u, mode=mode))


def mixed_product(problem: Problem, params: Params, meta: Params, batch: Any, u: Params, *, mode: Mode) -> Gradients:
    """Compute grad_phi of the directional derivative of the inner loss along a fixed u.

    Mode "forward" is one pass with dual numbers, "reverse" a double backward. "auto" uses "forward" for a `weighted`
    problem, and warns once if the model cannot; otherwise "reverse", as torch's tangents may be constants to autograd.

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
            tangent, through = _compared_influence(problem, params, meta, batch, u)
    except LevelTaken:
        if mode == "forward":
            raise
        return _reverse(*at)
    except (_Unverified, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        problem.memory.compare = problem.memory.compare or isinstance(error, _WrongTangents)
        instead = reverse_instead(error, lambda: _reverse(*at))
        lacks = f"an operation of this model has no forward-mode derivative ({first_line(error)})"
        what = str(error) if isinstance(error, _WrongTangents) else lacks
        if mode == "forward":
            raise MetaKDError(f"OneStep(mode='forward') fails: {what}; use mode='auto' or 'reverse'") from error
        problem.memory.forward_mode = False
        warnings.warn(
            f"{what}; reverse mode takes its place from now on: as exact, but with more time and memory "
            "(OneStep(mode='reverse') does so without this warning)",
            stacklevel=3,
        )
        return instead
    if problem.weighted is not None:
        return _in_meta(problem.weighted, meta, batch, tangent, through)
    if problem.memory.compare:
        reject_other_products(
            *at, forward=({}, found), reverse=lambda: ({}, _reverse(*at)), what="OneStep(mode='forward')"
        )
    return found


class _WrongTangents(MetaKDError):
    """Forward mode differs from reverse mode."""


class _Unverified(MetaKDError):
    """The product in the terms' own parameters cannot be compared with reverse mode."""


def reverse_instead(error: Exception, reverse: Callable[[], _T]) -> _T:
    """Run reverse mode after forward mode failed; an error of the losses themselves is raised again here.

    Raises:
        MetaKDError: reverse mode lacks a derivative, too.
    """
    try:
        return reverse()
    except NoSecondDerivative as second:
        raise MetaKDError(
            f"this model has neither a forward-mode derivative ({first_line(error)}) nor a second derivative "
            f"({second.fact}); {second.advice}"
        ) from second


def _compared_influence(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params
) -> tuple[Tensor, ThroughTerms]:
    """The losses' derivatives along u, and what has theirs in the terms' own parameters.

    Raises:
        _WrongTangents: a due comparison finds reverse mode different.
    """
    assert problem.weighted is not None
    through = ThroughTerms({name: meta[name] for name in problem.weighted.learned})
    tangent = influence(problem.weighted.at(meta, through), params, batch, u)
    if problem.memory.compare:
        problem.memory.compare = False
        with full_float32() as rounded:
            fine = influence(problem.weighted.at(meta), params, batch, u) if rounded else tangent
            found = compare_influence(problem, params, batch, u, fine)
        if found is not None:
            raise _WrongTangents(f"forward mode is wrong on this model, {found}")
        if problem.weighted.learned:
            _compare_learned(problem, params, meta, batch, u, tangent, through)
    return tangent, through


def _in_meta(
    weighted: WeightedLosses, meta: Params, batch: Any, tangent: Tensor, through: ThroughTerms, **options: Any
) -> Gradients:
    """The gradient in meta of (1/B) sum_ik w_ik times the losses' tangent; call it outside of dual numbers."""
    weights, size = weighted.weights(meta, batch), tangent.shape[0]
    if weighted.given is None:
        found = gradients((weights * (tangent / size)).sum(), meta)
    else:
        found = {**dict.fromkeys(meta), weighted.given: tangent / size}
    if not weighted.learned:
        return found
    return added(found, dict.fromkeys(meta) | through.product(weights.detach() / size, **options))


def _compare_learned(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params, tangent: Tensor, through: ThroughTerms
) -> None:
    """Compare the hypergradient with reverse mode: a term may hide what it reads of the student's pass."""
    assert problem.weighted is not None
    at = problem, params, meta, batch, u
    found = _in_meta(problem.weighted, meta, batch, tangent, through, retain_graph=True)
    try:
        reject_other_products(*at, forward=({}, found), reverse=lambda: ({}, _reverse(*at)), what="forward mode")
    except MetaKDError as error:
        kind = _Unverified if isinstance(error.__cause__, NoSecondDerivative) else _WrongTangents
        raise kind(str(error)) from error.__cause__


def _through_tangent(problem: Problem, params: Params, meta: Params, batch: Any, u: Params) -> Gradients:
    """Reverse mode through the whole inner loss's tangent, which the caller says is differentiable."""
    with dual_numbers():
        loss = problem.inner(duals(params, u), meta, batch)
        derivative = forward_ad.unpack_dual(loss).tangent
    # Outside of the block, so that the backward pass does not compute tangents.
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
