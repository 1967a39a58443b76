"""Update rules of one tensor as differentiable functions of its gradient; formulas of torch.optim, without TorchOpt."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakd.errors import MetaKDError


def mean(average: Tensor, g: Tensor, decay: float) -> Tensor:
    """The moving average decay * average + (1 - decay) * g.

    Examples:
        >>> mean(torch.tensor(2.0), torch.tensor(4.0), decay=0.5)
        tensor(3.)
    """
    return torch.add(decay * average, g, alpha=1.0 - decay)


def mean_square(average: Tensor, g: Tensor, decay: float) -> Tensor:
    """The moving average decay * average + (1 - decay) * g^2.

    Examples:
        >>> mean_square(torch.tensor(2.0), torch.tensor(2.0), decay=0.5)
        tensor(3.)
    """
    return torch.addcmul(decay * average, g, g, value=1.0 - decay)


def over_root(direction: Tensor, v: Tensor, eps: float) -> Tensor:
    """The quotient direction / (sqrt(v) + eps), with a finite derivative where v is zero.

    Where v is exactly zero (a dead unit, an unused class) the square root gets the derivative zero. With v = c g^2 the
    root is sqrt(c) |g|; at g = 0 its one-sided slopes cancel, and the direction that multiplies them is zero in most
    rules. What is left is 1 / eps times the derivative of the direction.

    Examples:
        >>> g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> torch.autograd.grad(over_root(g, g * g, eps=0.5), g)
        (tensor([2.], dtype=torch.float64),)
    """
    zero = v == 0
    root = torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())
    return direction / (root + eps)


def momentum_step(
    g: Tensor, buffer: Tensor | None, *, momentum: float, dampening: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """SGD's momentum: b' = mu b + (1 - dampening) g, or b' = g where there is no buffer yet; the update and b'.

    The update is b', with Nesterov's momentum g + mu b'.

    Examples:
        >>> momentum_step(torch.tensor(1.0), torch.tensor(2.0), momentum=0.5, dampening=0.0, nesterov=False)
        (tensor(2.), tensor(2.))
    """
    after = g if buffer is None else torch.add(momentum * buffer, g, alpha=1.0 - dampening)
    return (torch.add(g, after, alpha=momentum) if nesterov else after), after


def adam_direction(
    m: Tensor, v: Tensor, corrections: tuple[float | Tensor, float | Tensor], *, eps: float, eps_root: float = 0.0
) -> Tensor:
    """Adam's m_hat / (sqrt(v_hat + eps_root) + eps), with m_hat and v_hat over 1 - b1^t and 1 - b2^t, the corrections.

    Examples:
        >>> adam_direction(torch.tensor(0.5), torch.tensor(0.25), (0.5, 0.25), eps=1.0)
        tensor(0.5000)
    """
    # The cast back is for tensors without dimensions, which corrections in float64 would promote.
    m_hat, v_hat = (part / correction for part, correction in zip((m, v), corrections, strict=True))
    return over_root(m_hat.to(m.dtype), v_hat.to(v.dtype) + eps_root, eps)


def radam_direction(m: Tensor, v: Tensor, t: int, *, b1: float, b2: float, eps: float) -> Tensor:
    """RAdam's direction at its t-th step: rectified where the variance is known well enough, else m_hat.

    With rho = rho_inf - 2 t b2^t / (1 - b2^t), rho_inf = 2 / (1 - b2) - 1, it is for rho > 5

        m_hat * sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)) * sqrt(1 - b2^t) / (sqrt(v) + eps)

    Source: Liu et al., arXiv 1908.03265, as in torch.optim.RAdam.

    Examples:
        >>> radam_direction(torch.tensor(0.5), torch.tensor(0.25), 1, b1=0.5, b2=0.999, eps=1e-8)
        tensor(1.)
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
    """Clip the joint norm to `max_norm`; the clip factor min(1, max_norm / (norm + 1e-6)) is differentiated.

    A gradient of None, of a parameter that the loss did not reach, stays None.

    Raises:
        MetaKDError: the norm is not finite, and that was to be an error.

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
