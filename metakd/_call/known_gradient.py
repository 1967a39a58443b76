"""Passes a gradient that is already known to the user's `loss.backward()`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metakd._basics.together import times


def hand_over(loss: Tensor, leaves: list[Tensor], gradients: list[Tensor | None]) -> Tensor:
    """The same loss value, but its backward adds the given gradients to the leaves and runs no graph.

    Examples:
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
        found = iter(times([g for g in ctx.gradients if g is not None], scale))
        return None, None, *(None if g is None else next(found) for g in ctx.gradients)
