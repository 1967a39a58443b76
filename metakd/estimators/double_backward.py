"""Checks the double backward: a backward may be right although autograd cannot differentiate it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metakd._autodiff import (
    Gradients,
    gradients,
    graph_gradients,
    graph_nodes,
    joint_gradients,
    leaves,
    moved,
    norm,
    second_order_gradients,
    slope,
    with_zeros,
)
from metakd.errors import MetaKDError
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.problem import Problem
from metakd.estimators.tolerance import as_share, full_float32, tolerance_of
from metakd.estimators.verification import compare_influence
from metakd.inner import Params

Products = tuple[Gradients, Gradients]


@full_float32()
def reject_wrong_influence(problem: Problem, params: Params, batch: Any, u: Params) -> None:
    """Raise if a double backward gives other derivatives of the losses along u than first-order gradients do."""
    assert problem.weighted is not None
    weighted = problem.weighted.at(problem.meta_params)
    theta = leaves({name: params[name] for name in u})
    losses = twice_differentiable(lambda: weighted.losses({**params, **theta}, batch))
    cotangent = torch.zeros_like(losses, requires_grad=True)
    derivative = slope(graph_gradients((cotangent * losses).sum(), theta), u)
    tangent = torch.zeros_like(losses)
    if derivative is not None:
        tangent = with_zeros(second_order_gradients(derivative, {"w": cotangent}), {"w": losses.detach()})["w"]
    limit = problem.memory.tolerance or tolerance_of(losses)
    found = compare_influence(problem, params, batch, u, tangent.detach(), limit=limit)
    if found is not None:
        raise MetaKDError(f"reverse mode is wrong on this model: {found}. {_CAUSES}")


@full_float32()
def reject_wrong_products(
    problem: Problem, params: Params, meta: Params, batch: Any, u: Params, found: Products
) -> None:
    """Raise if a double backward's products with u differ from finite differences of first-order gradients.

    It checks only losses with an operation of the user's own, and only if their gradient is their derivative: a
    stop-gradient or a straight-through estimator is intended. Differences near kinks are no evidence: two step sizes
    must agree with each other.
    """
    theta = leaves(params)
    loss = problem.inner(theta, leaves(meta), batch)
    if not any(map(_is_users_own, graph_nodes(loss))):
        return
    expected = slope(gradients(loss, theta), u)
    length, precision = norm(u.values()), torch.finfo(next(iter(u.values())).dtype).eps
    if not length or precision > _HALF or expected is None:
        return
    h = precision ** (1 / 3) * max(norm(params[name] for name in u), 1e-3) / length

    def loss_at(step: float) -> float:
        return float(problem.inner(leaves(moved(params, u, step)), meta, batch).detach())

    if abs((loss_at(h) - loss_at(-h)) / (2 * h) - float(expected)) > _DIFFERENT / 2 * abs(float(expected)):
        return

    def differences(h: float) -> list[Tensor]:
        sides = []
        for step in (h, -h):
            near, phi = leaves(moved(params, u, step)), leaves(meta)
            sides.append(joint_gradients(problem.inner(near, phi, batch), near, phi))
        return [(a - b) / (2 * h) for a, b in zip(*(list(_flat(side)) for side in sides), strict=True)]

    def _flat(products: Products) -> Iterator[Tensor]:
        for part, asked, like in zip(products, found, (params, meta), strict=True):
            wanted = {name: like[name] for name in asked}
            yield from (value.detach().double() for value in with_zeros({n: part[n] for n in wanted}, wanted).values())

    coarse, fine, right = differences(h), differences(h / 8), list(_flat(found))
    off = norm(a - b for a, b in zip(fine, right, strict=True))
    unsure = norm(a - b for a, b in zip(fine, coarse, strict=True))
    size = max(norm(fine), norm(right))
    if off > _DIFFERENT * size and off > 10 * unsure:
        raise MetaKDError(
            "reverse mode is wrong on this model: a product with the inner loss's second derivatives is off by "
            f"{as_share(off / size)} from differences of its gradients. {_CAUSES}"
        )


def _is_users_own(node: Any) -> bool:
    """Whether a node is a user's `autograd.Function`, or an operation of `torch.library`."""
    owner = str(getattr(getattr(type(node), "_forward_cls", None), "__module__", "torch.autograd"))
    return not owner.startswith(("metakd.", "torch.")) or owner.startswith("torch._library")


_HALF = 1e-6  # coarser rounding leaves no usable differences
_DIFFERENT = 2e-2
_CAUSES = (
    "The backward of an operation, or a hook on an activation, gives the right gradient but cannot be differentiated "
    "itself: it recomputes a part of the model, detaches, saves an intermediate of forward, or leaves torch (.data, "
    "NumPy). Write it with differentiable operations on ctx.saved_tensors (recompute with torch.utils.checkpoint), or "
    "use estimators.FiniteDifference(), which needs only gradients"
)
