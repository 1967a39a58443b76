"""Which link between the outer loss and the meta-parameters is missing."""

from functools import partial
from typing import Any

from metakd._autodiff import Gradients, NoSecondDerivative, graph_gradients, graph_nodes, leaves
from metakd.batch import tensors
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.problem import Problem
from metakd.inner import Params


def missing_link(problem: Problem) -> str | None:
    """What cuts the outer loss off from the meta-parameters, in words; None where there is a way, if only for zeros.

    Goes the inner steps again, along autograd's graphs.

    Examples:
        >>> import torch, torchopt
        >>> sgd, start = torchopt.sgd(lr=0.1), {"x": torch.tensor(1.0)}
        >>> problem = Problem(lambda p, m, batch: p["x"] ** 2 + m["w"], [lambda p, m: p["x"]], start,
        ...                   {"w": torch.tensor(0.5)}, [None], lambda m: sgd, sgd.init(start))
        >>> missing_link(problem)
        'the outer loss feels the inner steps, but they do not depend on the meta-parameters. These are not used in ...'
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
            f"the outer loss depends on {felt[:5]} alone, and the inner steps move {sorted(moved)[:5]} alone. One of "
            "the losses misses a part of the model"
        )
    if depending[0]:
        return None
    return (
        "the outer loss feels the inner steps, but they do not depend on the meta-parameters. These are not used in "
        f"the inner loss, or cut from it ({_CUTS}), or stand in a term of it that has no parameters in it"
    )


def _depends(problem: Problem, t: int, params: Params, state: Any) -> bool:
    """Whether step t depends on the meta-parameters, as far as is known."""
    theta, meta = leaves(params), leaves(problem.meta_params)
    try:
        loss = twice_differentiable(partial(problem.inner_loss, theta, meta, t))
        after = problem.step(graph_gradients(loss, theta), state, theta, meta)
    except NoSecondDerivative:
        return True
    ends = {id(getattr(node, "variable", None)) for new in tensors(after) for node in graph_nodes(new)}
    return any(id(m) in ends for m in meta.values())


_CUTS = ".detach(), .item(), torch.no_grad()"
_OTHERS = f"It reads other tensors, or cut copies of these ({_CUTS})"
