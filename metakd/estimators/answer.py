"""Builds an estimator's answer, and checks every answer."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from metakd._autodiff import Gradients, with_zeros
from metakd._basics.checks import check
from metakd._basics.together import norm_of
from metakd.batch import map_tensors
from metakd.errors import MetaKDError
from metakd.estimators.links import missing_link
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.inner import Params


def answer(
    problem: Problem,
    outer_loss: Tensor,
    gradient: Gradients,
    params: Params,
    optimizer_state: Any,
    params_gradient: Params | None = None,
) -> Hypergradient:
    """The detached results; zeros for meta-parameters without influence."""
    state = map_tensors(Tensor.detach, optimizer_state)
    in_params = None if params_gradient is None else _detached(params_gradient)
    in_meta = _detached(with_zeros(gradient, problem.meta_params))
    return Hypergradient(outer_loss.detach(), in_meta, _detached(params), state, in_params)


def _detached(values: Params) -> Params:
    return {name: value.detach() for name, value in values.items()}


def check_answer(problem: Problem, found: Hypergradient) -> None:
    """Raise if a hypergradient is NaN or infinite, empty, or zero because nothing connects the losses.

    A zero is valid if the outer loss is connected to the meta-parameters.
    """
    gradient = found.gradient
    if not gradient and found.params_gradient is None:
        raise MetaKDError(
            "meta_params is empty, and this estimator has no gradient in params, so there is nothing to compute. "
            "Give a meta-parameter, or use estimators.Adjoint()"
        )
    if gradient:
        lasting = problem.at(problem.meta_params)  # a check may wait, and must not keep the training pass's graph alive
        check(partial(_judge, lasting, gradient), norm_of(list(gradient.values())))


def _judge(problem: Problem, gradient: Params, norm: float) -> None:
    # With several processes a zero gradient is fine: other ranks may contribute.
    if norm == 0.0 and problem.whole and (reason := _missing(problem)) is not None:
        raise MetaKDError(f"the hypergradient is zero for all meta-parameters {list(gradient)[:5]}: {reason}")
    if math.isfinite(norm):
        return
    for name, g in gradient.items():
        if broken := int((~g.isfinite()).sum()):
            raise MetaKDError(
                f"the hypergradient of {name!r} has {broken} NaN or infinite entries of "
                f"{g.numel()}; likely causes are a square root, a norm or a power at zero in the inner loss or in "
                "its optimizer (add a small number under the root), or an inner loss without second derivatives"
            )


def _missing(problem: Problem) -> str | None:
    try:
        return missing_link(problem)
    except RuntimeError:  # a check that was deferred comes when the graphs are gone
        return None
