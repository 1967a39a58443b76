"""Finds the missing link between the outer loss and the meta-parameters."""

from functools import partial
from typing import Any

from metakd._autodiff import Gradients, NoSecondDerivative, graph_gradients, graph_nodes, leaves
from metakd.batch import tensors
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.problem import Problem
from metakd.inner import Params


def missing_link(problem: Problem) -> str | None:
    """What disconnects the outer loss from the meta-parameters; None if they are connected.

    A connection counts even if all derivatives are zero. The check takes the inner steps again, along autograd's
    graphs.
    """
    moved: set[str] = set()
    depending: list[bool] = [False]

    def visit(t: int, params: Params, state: Any, gradient: Gradients) -> None:
        moved.update(name for name, g in gradient.items() if g is not None)
        depending[0] = depending[0] or _depends(problem, t, params, state)

    end, _ = problem.sweep(visit)
    _, in_params, in_meta = problem.outer_gradients(end)
    felt = [name for name, g in in_params.items() if g is not None]
    if any(g is not None for g in in_meta.values()):
        return None
    if not felt:
        return f"the outer loss depends neither on the parameters nor on the meta-parameters. {_OTHERS}"
    if not moved:
        return (
            f"the inner loss does not depend on the parameters {list(in_params)[:5]}, so no step moves them. {_OTHERS}"
        )
    if moved.isdisjoint(felt):
        return (
            f"the outer loss depends only on {felt[:5]}, and the inner steps move only {sorted(moved)[:5]}. One of "
            "the losses misses a part of the model"
        )
    if depending[0]:
        return None
    return (
        "the outer loss depends on the inner steps, but they do not depend on the meta-parameters. The inner loss does "
        f"not use these, cuts them off ({_CUTS}), or has them only in a term without parameters"
    )


def _depends(problem: Problem, t: int, params: Params, state: Any) -> bool:
    """Whether step t depends on the meta-parameters; yes if that cannot be seen."""
    theta, meta = leaves(params), leaves(problem.meta_params)
    try:
        loss = twice_differentiable(partial(problem.inner_loss, theta, meta, t))
        after = problem.step(graph_gradients(loss, theta), state, theta, meta)
    except NoSecondDerivative:
        return True
    ends = {id(getattr(node, "variable", None)) for new in tensors(after) for node in graph_nodes(new)}
    return any(id(m) in ends for m in meta.values())


_CUTS = ".detach(), .item(), torch.no_grad()"
_OTHERS = f"It reads other tensors, or copies that are cut off ({_CUTS})"
