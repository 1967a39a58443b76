"""What autograd is told by hand: hooks, functions and operations of the user's own."""

import torch
from torch import Tensor

from tests.proof.registry import operation, operations


@operation(by_autograd=True)
def hook_scales(x, a):
    z = (x @ a).tanh()
    if z.requires_grad:
        z.register_hook(lambda g: 0.3 * g)
    return z * x


@operation(by_autograd=True)
def hook_scales_by_value(x, a):
    z = (x @ a).tanh()
    if z.requires_grad:
        z.register_hook(lambda g: g * z)
    return z


@operation(by_autograd=True)
def hook_clips(x, a):
    z = x @ a
    if z.requires_grad:
        z.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return z.sin()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.7 * g


class Sine(torch.autograd.Function):
    """In the old style, without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class SineWithForwardMode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * x.cos()


class WrongForwardMode(SineWithForwardMode):
    """Its backward is right, its forward mode is not."""

    @staticmethod
    def jvp(ctx, tangent):
        return 1.3 * tangent


class SineOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class DetachedOnceDifferentiable(torch.autograd.Function):
    """Its backward hides its dependence on the input from autograd: no second derivative can be had from it."""

    @staticmethod
    def forward(ctx, x):
        ctx.saved = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved.cos()


@torch.library.custom_op("metakd_proof::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


@sine.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


sine.register_autograd(lambda ctx, g: g * ctx.saved_tensors[0].cos(), setup_context=_keep)


operations(
    custom_function=lambda x, a: Sine.apply(x @ a),
    custom_function_with_forward_mode=lambda x, a: SineWithForwardMode.apply(x @ a),
    custom_op=lambda x, a: sine(x @ a),
    custom_op_on_input=lambda x, a: sine(x) @ a,
)


operations({"wrong_in_torch": True}, custom_function_once=lambda x, a: SineOnce.apply(x @ a))


@operation(by_autograd=True)
def wrong_forward_mode(x, a):
    return WrongForwardMode.apply(x @ a)


@operation(by_autograd=True)
def hidden_derivative(x, a):
    return DetachedOnceDifferentiable.apply(x @ a)


@operation(by_autograd=True)
def gradient_reversal(x, a):
    return Reversal.apply(x @ a).tanh()
