"""Parts that are cut off from autograd: stopped gradients, straight-through estimators, numbers taken out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.proof.registry import operation


def _straight_through(z: Tensor) -> Tensor:
    return z + (z.detach().mul(4).round().div(4) - z.detach())


@operation(by_autograd=True)
def straight_through(x, a):
    return _straight_through((x @ a).tanh()) * x


@operation(by_autograd=True)
def stop_gradient(x, a):
    z = (x @ a).tanh()
    return z - 0.4 * z.detach() * x


@operation(by_autograd=True)
def no_grad_part(x, a):
    with torch.no_grad():
        target = (x @ a.T).softmax(1)
    return (x @ a).softmax(1) * target + x


@operation(by_autograd=True)
def data_part(x, a):
    return x @ a * (x.data @ a.data).tanh()


@operation(by_autograd=True)
def numpy_part(x, a):
    return (x @ a) * torch.from_numpy((x @ a).detach().cos().numpy().copy())


@operation(by_autograd=True)
def item_part(x, a):
    return (x @ a) * (0.5 + (x @ a).square().mean().item())


@operation(by_autograd=True)
def vector_quantised(x, a):
    z = (x @ a).tanh()
    codes = torch.linspace(-1, 1, 5, dtype=x.dtype)
    nearest = codes[(z.detach()[..., None] - codes).abs().argmin(-1)]
    return z + (nearest - z).detach()


@operation(by_autograd=True)
def clipped_by_norm_of_detached(x, a):
    z = x @ a
    return z / (1 + z.detach().norm())


@operation(by_autograd=True)
def gumbel_softmax_hard(x, a):
    return F.gumbel_softmax(x @ a, hard=True) * x


@operation(by_autograd=True)
def power_iteration_detached(x, a):
    """What spectral_norm does in train mode."""
    with torch.no_grad():
        v = F.normalize(torch.ones(len(a), dtype=a.dtype), dim=0)
        u = F.normalize(a @ v, dim=0)
        v = F.normalize(a.T @ u, dim=0)
    return x @ (a / (0.1 + torch.dot(u, a @ v).abs()))
