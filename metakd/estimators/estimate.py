"""Calls an estimator and checks that its answer fits the problem; asks an estimator about itself."""

from typing import Any

from torch import Tensor

from metakd.batch import map_tensors
from metakd.errors import MetaKDError
from metakd.estimators.answer import check_answer
from metakd.estimators.problem import Estimator, Problem
from metakd.estimators.result import Hypergradient


def estimate(estimator: Estimator, problem: Problem) -> Hypergradient:
    """The estimator's answer, detached.

    Raises:
        MetaKDError: it is no `Hypergradient`, its gradient does not fit the meta-parameters, or `check_answer` fails.
    """
    found = estimator(problem)
    if not isinstance(found, Hypergradient):
        raise MetaKDError(
            f"the estimator returned {type(found).__name__}, expected metakd.Hypergradient(outer_loss, gradient, "
            "params, optimizer_state)"
        )
    wanted = {name: tuple(value.shape) for name, value in problem.meta_params.items()}
    got = {n: tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__ for n, g in found.gradient.items()}
    if got != wanted:
        raise MetaKDError(
            f"the estimator's gradient has the names and shapes {got}, expected those of problem.meta_params, "
            f"{wanted}: one tensor for each, zeros if the outer loss does not depend on it"
        )
    check_answer(problem, found)
    return Hypergradient(*map_tensors(Tensor.detach, tuple(found)))


def checked_estimator(estimator: Any) -> Estimator:
    """The estimator; raise if it is a class, a name or not callable."""
    if isinstance(estimator, type):
        raise MetaKDError(f"estimator is the class {estimator.__name__}; give an object of it, {estimator.__name__}()")
    if not callable(estimator):
        raise MetaKDError(
            f"estimator is {estimator!r}; give an object such as estimators.Adjoint() or estimators.Unroll()"
        )
    found: Estimator = estimator
    return found


def is_exact(estimator: Estimator, steps: int) -> bool:
    """Whether the estimator is exact for this many inner steps; the default is yes."""
    says = getattr(estimator, "exact", None)
    return says is None or bool(says(steps))


def needs_second_derivatives(estimator: Estimator) -> bool:
    """Whether the estimator differentiates the inner loss twice; the default is yes."""
    return bool(getattr(estimator, "needs_second_derivatives", True))


def needs_forward_mode(estimator: Estimator) -> bool:
    """Whether the estimator needs forward mode; the default is no."""
    return bool(getattr(estimator, "needs_forward_mode", False))


def takes_shards(estimator: Estimator) -> bool:
    """Whether the estimator works where each process holds a part of the parameters; the default is no."""
    return bool(getattr(estimator, "takes_shards", False))


def solved(estimator: Estimator, problem: Problem) -> Problem:
    """The problem whose hypergradient the estimator gives; another one for `OneStep(parameters=...)`."""
    solves = getattr(estimator, "solved", None)
    return problem if solves is None else solves(problem)
