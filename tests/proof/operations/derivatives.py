"""Derivatives inside of the loss: autograd, torch.func, torch.autograd.functional."""

import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.proof.registry import operation, operations


def energy(x, a):
    """(B, D) to (B,)."""
    return (x @ a).tanh().square().sum(-1) + (x.sin() * a[0]).sum(-1)


def moved(x):
    """The features at an offset of zero that asks for gradients, and the offset."""
    offset = torch.zeros_like(x, requires_grad=True)
    return x + offset, offset


@operation
def force(x, a):
    at, offset = moved(x)
    return torch.autograd.grad(energy(at, a).sum(), offset, create_graph=True)[0]


@operation
def gradient_penalty(x, a):
    at, offset = moved(x)
    (g,) = torch.autograd.grad(energy(at, a).sum(), offset, create_graph=True)
    return x @ a + (g.norm(dim=1, keepdim=True) - 1).square()


@operation
def laplacian(x, a):
    at, offset = moved(x)
    (g,) = torch.autograd.grad(energy(at, a).sum(), offset, create_graph=True)
    parts = [torch.autograd.grad(g[:, i].sum(), offset, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(parts, 1)


@operation(needs_weights=True)
def penalty_in_weights(x, a):
    """The norm of the gradient in the weights themselves, as sharpness-aware and invariant training take it."""
    (g,) = torch.autograd.grad(energy(x, a).mean(), a, create_graph=True)
    return x * (1 + g.square().sum())


@operation(needs_weights=True)
def step_inside(x, a):
    """MAML's inner step, written by hand."""
    (g,) = torch.autograd.grad(energy(x, a).mean(), a, create_graph=True)
    return x @ (a - 0.1 * g)


@operation(needs_weights=True, by_autograd=True)
def first_order_step_inside(x, a):
    (g,) = torch.autograd.grad(energy(x, a).mean(), a)
    return x @ (a - 0.1 * g)


@operation
def higher_jacobian(x, a):
    return torch.autograd.functional.jacobian(lambda y: energy(y, a), x, create_graph=True).sum(1) + x @ a


@operation
def functional_hvp(x, a):
    return torch.autograd.functional.hvp(lambda y: energy(y, a).sum(), x, x.cos(), create_graph=True)[1]


def loss_of_one(y, a):
    return energy(y, a)


operations(
    func_grad=lambda x, a: grad(lambda y: energy(y, a).sum())(x),
    func_grad_of_weights=lambda x, a: x @ grad(lambda w: energy(x, w).mean())(a),
    per_sample_gradients=lambda x, a: vmap(grad(lambda w, y: energy(y, w)), in_dims=(None, 0))(a, x).square().sum(1),
    vmap=lambda x, a: vmap(lambda y: (y @ a).tanh() * y.sum())(x),
    vmap_of_weights=lambda x, a: vmap(lambda w: (x * w).sum(1))(a).T,
    vmap_of_layer_norm=lambda x, a: vmap(lambda y: F.layer_norm(y @ a, y.shape, eps=1e-2))(x),
    ensemble=lambda x, a: vmap(lambda w: (x @ w).tanh())(torch.stack([a, a.T, a.sin()])).mean(0),
    jacrev=lambda x, a: vmap(jacrev(lambda y: (y @ a).tanh() * y.sum()))(x),
    jacfwd=lambda x, a: vmap(jacfwd(lambda y: (y @ a).tanh() * y.sum()))(x),
    hessian=lambda x, a: vmap(hessian(lambda y: energy(y, a)))(x),
    func_jvp=lambda x, a: jvp(lambda y: (y @ a).tanh(), (x,), (x.sin(),))[1],
    func_vjp=lambda x, a: vjp(lambda y: (y @ a).tanh(), x)[1](x.sin())[0],
    divergence=lambda x, a: vmap(lambda y: jacrev(lambda z: (z @ a).tanh())(y).diagonal().sum())(x)[:, None] * x,
)


@operation
def forward_ad_inside(x, a):
    """Dual numbers of the user's own; torch does not nest them."""
    with torch.autograd.forward_ad.dual_level():
        z = (torch.autograd.forward_ad.make_dual(x, x.sin()) @ a).tanh()
        return torch.autograd.forward_ad.unpack_dual(z).tangent + 0


@operation
def checkpointed(x, a):
    return torch.utils.checkpoint.checkpoint(lambda y, w: (y @ w).tanh() @ w, x, a, use_reentrant=False)


@operation
def checkpointed_twice(x, a):
    def block(y):
        return (y @ a).tanh()

    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    return x


@operation
def checkpointed_dropout(x, a):
    return torch.utils.checkpoint.checkpoint(lambda y: F.dropout((y @ a).tanh(), 0.3), x, use_reentrant=False)


@operation
def saved_on_cpu(x, a):
    with torch.autograd.graph.save_on_cpu():
        return (x @ a).tanh() * x.exp().tanh()
