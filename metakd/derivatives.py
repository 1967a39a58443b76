"""First and second derivatives of a scalar, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.graph import graph_nodes

Params = dict[str, Tensor]
"""Tensors by name: parameters, or meta-parameters."""

Gradients = dict[str, Tensor | None]
"""A gradient by name; None where nothing depends on a tensor."""


def leaves(values: Params) -> Params:
    """The same values as fresh leaves of autograd."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """The gradients of a scalar by name; None where the loss does not reach a parameter."""
    if not loss.requires_grad:
        return dict.fromkeys(params)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return dict(zip(params, found, strict=True))


def in_both(
    loss: Tensor, params: Params, meta_params: Params, take: Callable[[Tensor, Params], Gradients] = gradients
) -> tuple[Gradients, Gradients]:
    """The gradients of a scalar in params and in meta_params, from one backward pass; the two may share names."""
    both = {f"theta.{name}": p for name, p in params.items()} | {f"phi.{name}": p for name, p in meta_params.items()}
    found = take(loss, both)
    return {name: found[f"theta.{name}"] for name in params}, {name: found[f"phi.{name}"] for name in meta_params}


def added(a: Gradients, b: Gradients) -> Gradients:
    """The sum of two gradients with the same names, where None is nothing."""
    pairs = {name: (value, b[name]) for name, value in a.items()}
    return {name: y if x is None else x if y is None else x + y for name, (x, y) in pairs.items()}


def filled(values: Gradients, like: Params) -> Params:
    """The gradients of the names in `like`, with zeros in place of None."""
    return {name: torch.zeros_like(p) if (g := values[name]) is None else g for name, p in like.items()}


def slope(gradient: Mapping[str, Tensor | None], along: Mapping[str, Tensor | None]) -> Tensor | None:
    """The inner product of a gradient and a direction, over what both have; None where that is nothing."""
    pairs = [(g, u) for name, g in gradient.items() if g is not None and (u := along.get(name)) is not None]
    return torch.stack([(g * u).sum() for g, u in pairs]).sum() if pairs else None


def graph_gradients(loss: Tensor, params: Params, seen: set[Any] | None = None) -> Gradients:
    """`gradients` with a graph of their own, known to be twice differentiable as far as Python sees.

    Args:
        loss: a scalar.
        params: what to differentiate in.
        seen: nodes of the graph that need no look any more; new ones are added.

    Raises:
        MetaKDError: an operation on the way is marked @once_differentiable. Where its incoming gradient is constant,
            autograd would lose what hangs behind it without a word.
    """
    reject_once_differentiable(loss, seen)
    return gradients(loss, params, create_graph=True)


def second_order_gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """`gradients` of a scalar that was built from gradients.

    Raises:
        MetaKDError: an operation on the way has no second derivative.
    """
    try:
        return gradients(loss, params, **options)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("is not implemented", "don't support automatic differentiation")):
            raise
        raise MetaKDError(f"{str(error).splitlines()[0][:160]}; {_NO_SECOND_ORDER}") from error


def reject_once_differentiable(loss: Tensor, seen: set[Any] | None = None) -> None:
    """See `graph_gradients`.

    Raises:
        MetaKDError: the graph of the loss holds an operation that is marked @once_differentiable.
    """
    for node in graph_nodes(loss, seen):
        operation = getattr(type(node), "_forward_cls", None)
        # The mark is a wrapper that torch's own module defines around the user's backward. The library's own operations
        # are twice differentiable, and mark the second time.
        if operation is None or operation.__module__.startswith("metakd."):
            continue
        if getattr(operation.backward, "__globals__", {}).get("__name__") == "torch.autograd.function":
            raise MetaKDError(f"{operation.__name__}.backward is marked @once_differentiable; {_NO_SECOND_ORDER}")


_NO_SECOND_ORDER = (
    "reverse mode would have to differentiate it twice. Use another kernel (for attention "
    "torch.nn.attention.SDPBackend.MATH), estimators.OneStep(mode='forward') or estimators.FiniteDifference()"
)
