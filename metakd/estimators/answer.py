"""An estimator's results as its answer, known to say something."""

from typing import Any

from torch import Tensor

from metakd.batch import map_tensors
from metakd.derivatives import Gradients, filled
from metakd.errors import MetaKDError
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
    """Detach the results, after making sure that the hypergradient says something.

    Zeros are an answer where the outer loss is connected to the meta-parameters.

    Raises:
        MetaKDError: the hypergradient is NaN or infinite, or nothing connects the two.
    """
    # Of a part nothing is no error: others add to it.
    if problem.whole and gradient and all(g is None for g in gradient.values()):
        raise MetaKDError(f"the hypergradient is None for all meta-parameters {list(gradient)[:5]}: {_cut(problem)}")
    if not gradient and params_gradient is None:
        raise MetaKDError(
            "meta_params is empty, and this estimator has no gradient in params: there is nothing to differentiate in. "
            "Give a meta-parameter, or use estimators.Adjoint()"
        )
    for name, g in gradient.items():
        if g is not None and not bool(g.isfinite().all()):
            raise MetaKDError(
                f"the hypergradient of {name!r} has {int((~g.isfinite()).sum())} NaN or infinite entries of "
                f"{g.numel()}; a square root, a norm or a power at zero in the inner loss or in its optimizer does "
                "that (add a small number under the root), as does an inner loss without second derivatives"
            )
    found = outer_loss, filled(gradient, problem.meta_params), params, optimizer_state, params_gradient
    return Hypergradient(*map_tensors(Tensor.detach, found))


def _cut(problem: Problem) -> str:
    """Which link between the outer loss and the meta-parameters is missing, found by going there again."""
    params, gradients = problem.params, []
    with_steps = problem.sweep(lambda t, p, state, gradient: gradients.append(gradient))
    _, in_params, _ = problem.outer_gradients(with_steps[0])
    if all(g is None for g in in_params.values()):
        return (
            "the outer loss depends neither on the parameters nor on the meta-parameters. It reads other tensors, or "
            "cut copies of these (.detach(), .item(), torch.no_grad())"
        )
    moved = {name for gradient in gradients for name, g in gradient.items() if g is not None}
    if not moved:
        return (
            f"the inner loss does not depend on the parameters {list(params)[:5]}, so that no inner step moves them. "
            "It reads other tensors, or cut copies of these (.detach(), .item(), torch.no_grad())"
        )
    if not any(g is not None and name in moved for name, g in in_params.items()):
        felt = [name for name, g in in_params.items() if g is not None]
        return (
            f"the outer loss depends on {felt[:5]} alone, and the inner steps move {sorted(moved)[:5]} alone. One of "
            "the losses misses a part of the model"
        )
    return (
        "the outer loss feels the inner steps, but their gradients do not depend on the meta-parameters. These are not "
        "used in the inner loss, or cut from it (.detach(), .item(), torch.no_grad()), or stand in a term of it that "
        "has no parameters in it; or the optimizer's updates are cut from the gradients"
    )
