"""An estimator called, and its answer known to fit the problem: whoever has an estimator calls it so."""

from torch import Tensor

from metakd.errors import MetaKDError
from metakd.estimators.problem import Estimator, Hypergradient, Problem, answer


def estimate(estimator: Estimator, problem: Problem) -> Hypergradient:
    """What the estimator answers, detached.

    Raises:
        MetaKDError: it is no `Hypergradient`, or its gradient does not fit the meta-parameters, or is zero, NaN or
            infinite.

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
    return answer(problem, found.outer_loss, {**found.gradient}, found.params, found.optimizer_state)
