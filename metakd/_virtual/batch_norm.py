r"""Batch normalisation whose second derivatives and tangents reuse its fused kernels.

With $\hat x = (x - \mu) / \sigma$ over the n values of a channel, $y = \gamma \hat x + \beta$ has the Jacobian

$$J = \frac{\gamma}{\sigma} P, \qquad P = I - \frac{1}{n} 1 1^\top - \frac{1}{n} \hat x \hat x^\top.$$

J is symmetric, so the backward kernel also computes the tangent $J \dot x$, and two more calls of it give the
derivative of the backward pass. Torch's own formulas for both take many more passes over the memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with faster forward-mode and second derivatives."""
    moved = forward_ad.unpack_dual(input).tangent is not None
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    statistics = running_mean, running_var
    if moved is graph or (training and input.numel() == input.shape[1]):
        # Neither tangent nor graph; or both, for the tangent of a backward pass; or torch raises an error.
        return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    use_batch = training or running_mean is None or running_var is None
    if moved:
        return _dual(input, statistics, weight, bias, use_batch, momentum, eps)
    if not use_batch:
        return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    result: Tensor = _BatchNorm.apply(input, weight, bias, statistics, momentum, eps)  # type: ignore[no-untyped-call]
    return result


def _dual(
    input: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Value and tangent, J x' + gamma' x_hat + beta'."""
    x, moved = forward_ad.unpack_dual(input)
    gamma, gamma_moved = (None, None) if weight is None else forward_ad.unpack_dual(weight)
    beta, beta_moved = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    running_mean, running_var = statistics
    y, mean, scale = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, use_batch, momentum, eps)
    if running_mean is not None and running_var is not None and not use_batch:
        mean, scale = running_mean, torch.rsqrt(running_var + eps)
    tangent = torch.ops.aten.native_batch_norm_backward(
        moved, x, gamma, running_mean, running_var, mean, scale, use_batch, eps, [True, False, False]
    )[0]
    if gamma_moved is not None:
        known = (None, None) if use_batch else statistics
        tangent.add_(torch.native_batch_norm(x, gamma_moved, beta_moved, *known, use_batch, 0.0, eps)[0])
    elif beta_moved is not None:
        tangent.add_(_by_channel(beta_moved, x))
    dual: Tensor = forward_ad.make_dual(y, tangent)
    return dual


class _BatchNorm(torch.autograd.Function):
    """y from x, gamma and beta, with the batch's statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Any, momentum: float, eps: float
    ) -> Tensor:
        running_mean, running_var = statistics
        y, mean, scale = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, gamma, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, scale = ctx.saved_tensors
        in_x, in_gamma, in_beta = _Backward.apply(g, x, gamma, mean, scale, ctx.eps)  # type: ignore[no-untyped-call]
        asked = ctx.needs_input_grad
        return in_x, in_gamma if asked[1] else None, in_beta if asked[2] else None, None, None, None


class _Backward(torch.autograd.Function):
    r"""$J g$, $\langle g, \hat x \rangle$ and $\langle g, 1 \rangle$ from g, x and gamma.

    With $K = P / \sigma$, $J = \gamma K$. For cotangents b, c and d of the three results, by channel, the gradient
    in g is $\gamma K b + c\, \hat x + d$, in gamma $\langle b, K g \rangle$, and in x, by
    $\partial \sigma / \partial x = \hat x / n$ and $\partial \hat x / \partial x = K$,

    $$c\, K g - \frac{\gamma}{n \sigma} \Big( \langle g, \hat x \rangle\, K b + \langle b, \hat x \rangle\, K g
      + \langle b, K g \rangle\, \hat x \Big).$$
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, gamma, mean, scale)
        ctx.eps = eps
        return _kernel(g, x, gamma, mean, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor | None, ...]:
        g, x, gamma, mean, scale = ctx.saved_tensors
        kg, g_hat, _ = _kernel(g, x, None, mean, scale, ctx.eps)
        kb, b_hat, _ = _kernel(b, x, None, mean, scale, ctx.eps)
        b_kg = (b * kg).sum([i for i in range(x.ndim) if i != 1])
        factor = scale * (x.shape[1] / x.numel()) * (1.0 if gamma is None else gamma)
        slope = -factor * b_kg * scale
        in_x = kg.mul_(_by_channel(c - factor * b_hat, x)).addcmul_(kb, _by_channel(-factor * g_hat, x))
        in_x.addcmul_(x, _by_channel(slope, x)).sub_(_by_channel(slope * mean, x))
        slope = c * scale
        in_g = (kb if gamma is None else kb.mul_(_by_channel(gamma, x))).addcmul_(x, _by_channel(slope, x))
        in_g.add_(_by_channel(d - slope * mean, x))
        return in_g, in_x, None if gamma is None else b_kg, None, None, None


def _kernel(
    g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """J g (K g without gamma), <g, x_hat> and <g, 1>."""
    if gamma is None:
        gamma = torch.ones_like(mean)  # without it CUDA's kernel cannot give the second and third result
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, None, None, mean, scale, True, eps, [True, True, True]
    )
    return found


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view([1, -1] + [1] * (like.ndim - 2))
