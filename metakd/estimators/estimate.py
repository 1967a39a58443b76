"""An estimator called, and its answer known to fit the problem: whoever has an estimator calls it so."""

from typing import Any

from torch import Tensor

from metakd.batch import map_tensors
from metakd.errors import MetaKDError
from metakd.estimators.answer import check_answer
from metakd.estimators.problem import Estimator, Problem
from metakd.estimators.result import Hypergradient


def estimate(estimator: Estimator, problem: Problem) -> Hypergradient:
    """What the estimator answers, detached.

    Raises:
        MetaKDError: it is no `Hypergradient`, or its gradient does not fit the meta-parameters, or is NaN or infinite.

    Examples:
        >>> import torch
        >>> from metakd.inner import repaired
        >>> import torchopt
        >>> problem = Problem(lambda p, m, batch: m["phi"] * p["w"], [lambda p, m: p["w"]], {"w": torch.ones(())},
        ...                   {"phi": torch.ones(())}, [None], lambda m: repaired(torchopt.sgd(lr=0.1)), ())
        >>> estimate(lambda problem: 3.0, problem)
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: the estimator returned float, expected metakd.Hypergradient(outer_loss, ...
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
            f"{wanted}: one tensor for each, zeros where the outer loss does not feel it"
        )
    check_answer(problem, found)
    return Hypergradient(*map_tensors(Tensor.detach, tuple(found)))


def checked_estimator(estimator: Any) -> Estimator:
    """The estimator, known to be an object that can be called on a problem.

    Raises:
        MetaKDError: it is a class, a name or nothing that can be called.

    Examples:
        >>> checked_estimator("unroll")
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: estimator is 'unroll'; give an object such as estimators.Adjoint() or ...
    """
    if isinstance(estimator, type):
        raise MetaKDError(f"estimator is the class {estimator.__name__}; give an object of it, {estimator.__name__}()")
    if not callable(estimator):
        raise MetaKDError(
            f"estimator is {estimator!r}; give an object such as estimators.Adjoint() or estimators.Unroll()"
        )
    found: Estimator = estimator
    return found


def is_exact(estimator: Estimator, steps: int) -> bool:
    """Whether the estimator is exact for that many inner steps; one that does not say is taken to be.

    Examples:
        >>> from metakd.estimators import Truncated
        >>> is_exact(Truncated(2), 2), is_exact(Truncated(2), 3)
        (True, False)
    """
    says = getattr(estimator, "exact", None)
    return says is None or bool(says(steps))


def needs_second_derivatives(estimator: Estimator) -> bool:
    """Whether the estimator differentiates the inner loss twice; one that does not say is taken to.

    Examples:
        >>> from metakd.estimators import Adjoint, FiniteDifference
        >>> needs_second_derivatives(Adjoint()), needs_second_derivatives(FiniteDifference())
        (True, False)
    """
    return bool(getattr(estimator, "needs_second_derivatives", True))


def needs_forward_mode(estimator: Estimator) -> bool:
    """Whether the estimator has no other way than forward mode; one that does not say is taken to have.

    Examples:
        >>> from metakd.estimators import OneStep
        >>> needs_forward_mode(OneStep()), needs_forward_mode(OneStep("forward"))
        (False, True)
    """
    return bool(getattr(estimator, "needs_forward_mode", False))


def solved(estimator: Estimator, problem: Problem) -> Problem:
    """The problem whose hypergradient this estimator's is, where that is another one: `OneStep(parameters=...)`."""
    solves = getattr(estimator, "solved", None)
    return problem if solves is None else solves(problem)
