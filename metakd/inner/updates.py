"""Update rules as differentiable functions of the gradient; formulas of torch.optim, without TorchOpt.

A gradient of None stands for a parameter the loss did not reach: its update is None and its state stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.errors import MetaKDError

Gradients = Sequence[Tensor | None]


def momentum_step(
    gradients: Gradients,
    buffers: Sequence[Tensor],
    started: Sequence[bool],
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[list[Tensor | None], list[Tensor], list[bool]]:
    """SGD's momentum: b' = mu b + (1 - dampening) g, or b' = g where the buffer has not `started`.

    The update is b', with Nesterov's momentum g + mu b'. Whether a buffer has started is part of the state.

    Examples:
        >>> g, b = [torch.tensor(1.0)], [torch.tensor(2.0)]
        >>> momentum_step(g, b, [True], momentum=0.5, dampening=0.0, nesterov=False)[0]
        [tensor(2.)]
    """
    updates: list[Tensor | None] = []
    new_buffers: list[Tensor] = []
    for g, b, warm in zip(gradients, buffers, started, strict=True):
        if g is None:
            updates.append(None)
            new_buffers.append(b)
            continue
        buffer = momentum * b + (1.0 - dampening) * g if warm else g
        updates.append(g + momentum * buffer if nesterov else buffer)
        new_buffers.append(buffer)
    now_started = [warm or g is not None for g, warm in zip(gradients, started, strict=True)]
    return updates, new_buffers, now_started


def adam_step(
    gradients: Gradients,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    b1: float,
    b2: float,
    eps: float,
    eps_root: float = 0.0,
) -> tuple[list[Tensor | None], list[Tensor], list[Tensor], list[Tensor]]:
    """Adam's direction m_hat / (sqrt(v_hat + eps_root) + eps), and the new m, v and step counts.

    The bias corrections are computed in float64. Where v is exactly zero (a dead unit, an unused class) the
    square root gets the derivative zero: the true derivative of the direction there is 1 / eps times that of
    m_hat, and the factor that multiplies the root's infinite slope, m_hat, is zero.

    Examples:
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> (direction,), *_ = adam_step([g], [zero], [zero], [torch.tensor(0)], b1=0.9, b2=0.999, eps=1e-8)
        >>> round(torch.autograd.grad(direction, g)[0].item() * 1e-8, 12)
        1.0
    """
    updates: list[Tensor | None] = []
    new_first, new_second, new_counts = list(first), list(second), list(counts)
    for i, g in enumerate(gradients):
        if g is None:
            updates.append(None)
            continue
        count = counts[i] + 1
        m = b1 * first[i] + (1.0 - b1) * g
        v = b2 * second[i] + (1.0 - b2) * g * g
        power = count.to(torch.float64)
        # The cast back is for parameters without dimensions, which the power would promote to float64.
        m_hat, v_hat = (m / (1.0 - b1**power)).to(m.dtype), (v / (1.0 - b2**power)).to(v.dtype)
        updates.append(m_hat / (_sqrt(v_hat + eps_root) + eps))
        new_first[i], new_second[i], new_counts[i] = m, v, count
    return updates, new_first, new_second, new_counts


def clip_norm(
    gradients: Gradients, *, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> list[Tensor | None]:
    """Clip the joint norm to `max_norm`; the clip factor min(1, max_norm / (norm + 1e-6)) is differentiated.

    Examples:
        >>> clip_norm([torch.tensor([3.0, 4.0])], max_norm=1.0)[0].norm() < 1.0
        tensor(True)
    """
    present = [g for g in gradients if g is not None]
    if not present:
        return list(gradients)
    norms = torch.stack([torch.linalg.vector_norm(g, norm_type).to(present[0].device) for g in present])
    norm = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise MetaKDError(
            f"the gradients of an inner step cannot be clipped: their norm of order {norm_type} is {norm.item()}; "
            "lower the learning rate, or look for invalid inputs in its batch"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * factor.to(g) for g in gradients]


def _sqrt(v: Tensor) -> Tensor:
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)
