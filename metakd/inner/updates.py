"""torch.optim's update rules for one tensor, as differentiable functions of its gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.errors import MetaKDError


def mean(average: Tensor, g: Tensor, decay: float) -> Tensor:
    """The moving average decay * average + (1 - decay) * g."""
    return torch.add(decay * average, g, alpha=1.0 - decay)


def mean_square(average: Tensor, g: Tensor, decay: float) -> Tensor:
    """The moving average decay * average + (1 - decay) * g^2."""
    return torch.addcmul(decay * average, g, g, value=1.0 - decay)


def over_root(direction: Tensor, v: Tensor, eps: float) -> Tensor:
    """The quotient direction / (sqrt(v) + eps), with a finite derivative where v is zero.

    Where v is exactly zero (a dead unit, an unused class), the square root gets the derivative zero: with v = c g^2 it
    is sqrt(c) |g|, whose one-sided slopes cancel, and most rules multiply it by a direction that is zero there.
    """
    zero = v == 0
    root = torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())
    return direction / (root + eps)


def momentum_step(
    g: Tensor, buffer: Tensor | None, *, momentum: float, dampening: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """SGD with momentum: returns the update and the new buffer b' = mu b + (1 - dampening) g, or g in the first step.

    The update is b', or g + mu b' with Nesterov's momentum.
    """
    after = g if buffer is None else torch.add(momentum * buffer, g, alpha=1.0 - dampening)
    return (torch.add(g, after, alpha=momentum) if nesterov else after), after


def adam_direction(
    m: Tensor, v: Tensor, corrections: tuple[float | Tensor, float | Tensor], *, eps: float, eps_root: float = 0.0
) -> Tensor:
    """Adam's m_hat / (sqrt(v_hat + eps_root) + eps), with the bias corrections 1 - b1^t and 1 - b2^t."""
    # Cast back, because corrections in float64 promote tensors without dimensions.
    m_hat, v_hat = (part / correction for part, correction in zip((m, v), corrections, strict=True))
    return over_root(m_hat.to(m.dtype), v_hat.to(v.dtype) + eps_root, eps)


def radam_direction(m: Tensor, v: Tensor, t: int, *, b1: float, b2: float, eps: float) -> Tensor:
    """RAdam's direction at step t: rectified if the variance estimate is reliable (rho > 5), else m_hat.

    With rho = rho_inf - 2 t b2^t / (1 - b2^t) and rho_inf = 2 / (1 - b2) - 1 the rectified direction is

        m_hat * sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)) * sqrt(1 - b2^t) / (sqrt(v) + eps)

    Source: Liu et al., arXiv 1908.03265, as in torch.optim.RAdam.
    """
    m_hat = m / (1.0 - b1**t)
    correction, longest = 1.0 - b2**t, 2.0 / (1.0 - b2) - 1.0
    rho = longest - 2.0 * t * b2**t / correction
    if rho <= 5.0:
        return m_hat
    rectified = (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho)
    return over_root(m_hat * math.sqrt(rectified * correction), v, eps)


def clip_norm(
    gradients: Sequence[Tensor | None], *, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> list[Tensor | None]:
    """Clip the joint norm by the differentiable factor min(1, max_norm / (norm + 1e-6)); None gradients stay None."""
    present = [g for g in gradients if g is not None]
    if not present:
        return list(gradients)
    norms = torch.stack([torch.linalg.vector_norm(g, norm_type).to(present[0].device) for g in present])
    norm = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise MetaKDError(
            f"the gradients of an inner step cannot be clipped: their norm of order {norm_type} is {norm.item()}; "
            "lower the learning rate, or check its batch for invalid inputs"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * factor.to(g) for g in gradients]
