"""Batch normalisation of dual numbers, by the fused kernels of its forward and backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


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
    r"""`torch.nn.functional.batch_norm`, with a faster forward-mode derivative.

    With $\hat x = (x - \mu) / \sigma$ over the n values of a channel, $y = \gamma \hat x + \beta$ has the tangent

    $$\dot y = J \dot x + \dot\gamma\, \hat x + \dot\beta, \qquad
      J = \frac{\gamma}{\sigma} \Big(I - \frac{1}{n} 1 1^\top - \frac{1}{n} \hat x \hat x^\top\Big).$$

    J is symmetric, so that $J \dot x$ is what the backward pass gives for the incoming gradient $\dot x$: one fused
    kernel, where torch's own formula goes over the memory again and again.

    Example:
        >>> x, tangent = torch.randn(8, 3), torch.randn(8, 3)
        >>> ours, torchs = (
        ...     torch.func.jvp(lambda x: function(x, None, None, training=True), (x,), (tangent,))[1]
        ...     for function in (batch_norm, F.batch_norm))
        >>> torch.allclose(ours, torchs, atol=1e-6)
        True
    """
    x, moved = forward_ad.unpack_dual(input)
    # Where a graph is asked for as well, the tangent must be differentiable itself; torch's formula is.
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    if moved is None or graph or (training and x.numel() == x.shape[1]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    gamma, gamma_moved = (None, None) if weight is None else forward_ad.unpack_dual(weight)
    beta, beta_moved = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    use_batch = training or running_mean is None or running_var is None
    y, mean, scale = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, use_batch, momentum, eps)
    if running_mean is not None and running_var is not None and not training:
        mean, scale = running_mean, torch.rsqrt(running_var + eps)
    tangent = torch.ops.aten.native_batch_norm_backward(
        moved, x, gamma, running_mean, running_var, mean, scale, use_batch, eps, [True, False, False]
    )[0]
    channels = [1, -1] + [1] * (x.ndim - 2)
    if gamma_moved is not None:
        slope = gamma_moved * scale
        tangent.addcmul_(x, slope.view(channels)).sub_((slope * mean).view(channels))
    if beta_moved is not None:
        tangent.add_(beta_moved.view(channels))
    dual: Tensor = forward_ad.make_dual(y, tangent)
    return dual
