"""Operations on many tensors at once: one kernel for all of a device and dtype, instead of one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def clones(values: Sequence[Tensor]) -> list[Tensor]:
    """Detached copies, bit for bit.

    Examples:
        >>> x = torch.ones(2)
        >>> (copy,) = clones([x])
        >>> copy.add_(1), x
        (tensor([2., 2.]), tensor([1., 1.]))
    """
    if not values:
        return []
    values = [value.detach() for value in values]
    new = [_alike(value) for value in values]
    copy_into(new, values)
    return new


def copy_into(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into tensors of the same shapes."""
    if not into:
        return
    with torch.no_grad():
        for at in _alike_groups(into, values):
            if len(at) == 1:
                into[at[0]].copy_(values[at[0]])
            else:
                torch._foreach_copy_([into[i] for i in at], [values[i] for i in at])


def scaled(values: Sequence[Tensor], factor: float) -> tuple[Tensor, ...]:
    """Each tensor times a number; differentiable, any number of times, by as many kernels."""
    if not values:
        return ()
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in values):
        return tuple(torch._foreach_mul(list(values), factor))
    found: tuple[Tensor, ...] = _Scaled.apply(factor, *values)  # type: ignore[no-untyped-call]
    return found


class _Scaled(torch.autograd.Function):
    """Torch's own backward pass of an operation on many tensors takes a kernel for each."""

    @staticmethod
    def forward(ctx: Any, factor: float, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.factor = factor
        ctx.set_materialize_grads(False)
        return tuple(torch._foreach_mul(list(values), factor))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(scaled([g for g in gradients if g is not None], ctx.factor))
        return None, *(None if g is None else next(found) for g in gradients)


def times(values: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Each tensor times a tensor of one number, without a graph."""
    if any(value.layout != torch.strided or value.device != factor.device for value in values):
        return [value * factor for value in values]
    return list(torch._foreach_mul(list(values), factor)) if values else []


def summed(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """The sums of two lists of tensors, one by one; differentiable."""
    return list(torch._foreach_add(list(first), list(second))) if first else []


def norm_of(values: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of several tensors together."""
    joined = values[0] if len(values) == 1 else torch.cat([value.flatten() for value in values])
    norm: Tensor = torch.linalg.vector_norm(joined)
    return norm


def _alike(value: Tensor) -> Tensor:
    """An empty tensor for a copy; a view that repeats memory, or a sparse tensor, is no room to write to."""
    return torch.empty_like(value) if value.layout == torch.strided else value.clone()


def _alike_groups(into: Sequence[Tensor], values: Sequence[Tensor]) -> list[list[int]]:
    """The positions of tensors that one kernel can write."""
    groups: dict[Any, list[int]] = {}
    for i, (new, old) in enumerate(zip(into, values, strict=True)):
        alone = new.layout != torch.strided or type(new) is not Tensor or new.device != old.device
        groups.setdefault(i if alone else (new.device, new.dtype, old.dtype), []).append(i)
    return list(groups.values())
