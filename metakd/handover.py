"""A gradient that is known already, handed on to the user's `loss.backward()`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def graph_nodes(loss: Tensor, seen: set[Any] | None = None) -> Iterator[Any]:
    """All nodes of the graph that a loss hangs on, without those `seen` before, to which they are added."""
    seen, waiting = set() if seen is None else seen, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(function for function, _ in node.next_functions)


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """All leaves of autograd that a loss depends on.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> graph_leaves((w * w.detach()).sum())[0] is w
        True
    """
    variables = [node.variable for node in graph_nodes(loss) if hasattr(node, "variable")]
    return list({id(variable): variable for variable in variables}.values())


def hand_over(loss: Tensor, leaves: list[Tensor], gradients: list[Tensor | None]) -> Tensor:
    """The same value, whose backward adds these gradients to the leaves, without running the graph again.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> (2 * hand_over(torch.tensor(3.0), [w], [torch.tensor([5.0])])).backward()
        >>> w.grad
        tensor([10.])
    """
    handed: Tensor = _HandOver.apply(loss.detach(), gradients, *leaves)  # type: ignore[no-untyped-call]
    return handed


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * scale for g in ctx.gradients)
