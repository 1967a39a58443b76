"""The losses of dual outputs, by two backward passes through the terms alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metakd.batch import map_tensors, tensors
from metakd.derivatives import reject_once_differentiable
from metakd.errors import MetaKDError


def dual_losses(evaluate: Callable[[Any], Tensor], outputs: Any) -> Tensor:
    r"""The losses of a student's outputs; where those are dual numbers, so are the losses.

    With c a cotangent of the losses $\ell(z)$, $s(c) = \langle J^\top c, \dot z \rangle$ is linear in c, and its
    gradient is the tangent $J \dot z$. For the few and small operations of the terms that is cheaper than to carry
    tangents through them: where torch meets a dual number beside a constant, it runs Python to find out the shape of a
    zero.
    Terms that cannot be differentiated twice are evaluated on the dual numbers.

    Args:
        evaluate: outputs -> losses (B, M).
        outputs: of the student, with tangents or without.

    Examples:
        >>> z, tangent = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])
        >>> with forward_ad.dual_level():
        ...     losses = dual_losses(lambda z: z[:, None] ** 2, forward_ad.make_dual(z, tangent))
        ...     forward_ad.unpack_dual(losses).tangent.flatten()
        tensor([1., 4.])
    """
    moved = [forward_ad.unpack_dual(t).tangent for t in tensors(outputs)]
    graph = any(t.requires_grad for t in tensors(outputs))  # where a gradient is to have tangents, as in `Adjoint`
    copied = isinstance(outputs, Tensor) or type(outputs) in (tuple, list, dict)  # other types lose more than tensors
    if graph or not copied or all(tangent is None for tangent in moved):
        return evaluate(outputs)
    tangents = iter(moved)

    def leaf(t: Tensor) -> Tensor:
        primal: Tensor = forward_ad.unpack_dual(t).primal.detach()
        return primal if next(tangents) is None else primal.requires_grad_()

    plain = map_tensors(leaf, outputs)
    with torch.enable_grad():
        losses = evaluate(plain)
        try:
            tangent = _tangent(losses, tensors(plain), moved)
        except (RuntimeError, MetaKDError):
            return evaluate(outputs)
    if tangent is None:
        return losses.detach()
    dual: Tensor = forward_ad.make_dual(losses.detach(), tangent)
    return dual


def _tangent(losses: Tensor, outputs: list[Tensor], moved: list[Tensor | None]) -> Tensor | None:
    if not losses.requires_grad:
        return None
    reject_once_differentiable(losses)
    cotangent = torch.ones_like(losses, requires_grad=True)
    pairs = [(z, tangent) for z, tangent in zip(outputs, moved, strict=True) if tangent is not None]
    found = torch.autograd.grad(losses, [z for z, _ in pairs], cotangent, create_graph=True, allow_unused=True)
    slopes = [(g * tangent).sum() for g, (_, tangent) in zip(found, pairs, strict=True) if g is not None]
    return torch.autograd.grad(torch.stack(slopes).sum(), cotangent)[0] if slopes else None
