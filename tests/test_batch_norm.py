"""Batch normalisation by fused kernels: value, gradients, second derivatives and tangent are torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from metakd._virtual.batch_norm import batch_norm


def tensors(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def both(function, primals, tangents, **options):
    """Value and tangent; None stands for an argument that is left out, a tangent of None for a constant."""
    with forward_ad.dual_level():
        dual = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        return forward_ad.unpack_dual(function(dual[0], *options.pop("running"), *dual[1:], **options))


@given(
    shape=st.sampled_from([(4, 3), (2, 3, 5), (3, 2, 2, 4), (2, 2, 1, 2, 3), (6, 1)]),
    weight=st.sampled_from(["none", "constant", "moved"]),
    bias=st.sampled_from(["none", "constant", "moved"]),
    running=st.booleans(),
    training=st.booleans(),
    channels_last=st.booleans(),
    momentum=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_value_tangent_and_statistics_are_torchs(shape, weight, bias, running, training, channels_last, momentum, seed):
    x, x_tangent = tensors(shape, seed)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    primals, tangents = [x], [x_tangent]
    for i, kind in enumerate((weight, bias)):
        p, t = tensors(shape[1], seed + i + 1)
        primals.append(None if kind == "none" else p)
        tangents.append(t if kind == "moved" else None)
    found = []
    for function in (batch_norm, F.batch_norm):
        statistics = [torch.full((shape[1],), v, dtype=x.dtype) if running else None for v in (0.3, 1.7)]
        result = both(
            function, primals, tangents, running=statistics, training=training or not running, momentum=momentum
        )
        found.append([*result, *(s for s in statistics if s is not None)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


@given(
    shape=st.sampled_from([(4, 3), (2, 3, 5), (3, 2, 2, 4), (2, 2, 1, 2, 3), (6, 1)]),
    weight=st.sampled_from(["none", "constant", "learned", "zero"]),
    bias=st.sampled_from(["none", "constant", "learned"]),
    learned_input=st.booleans(),
    training=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_gradients_and_second_derivatives_are_torchs(shape, weight, bias, learned_input, training, channels_last, seed):
    assume(weight != "none" or bias != "learned")  # see the next test
    x, cotangent = tensors(shape, seed)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    arguments = [x]
    for i, kind in enumerate((weight, bias)):
        p = tensors(shape[1], seed + i + 1)[0]
        arguments.append({"none": None, "zero": torch.zeros_like(p)}.get(kind, p))
    learned = [learned_input, weight in ("learned", "zero"), bias == "learned"]
    if not any(learned):
        learned[0] = True
    found = []
    for function in (batch_norm, F.batch_norm):
        p = [
            None if t is None else t.clone().requires_grad_(asked) for t, asked in zip(arguments, learned, strict=True)
        ]
        leaves = [t for t, asked in zip(p, learned, strict=True) if asked]
        g = cotangent.clone().requires_grad_()
        statistics = [torch.full((shape[1],), v, dtype=x.dtype) for v in (0.3, 1.7)]
        y = function(p[0], *statistics, *p[1:], training=training)
        first = torch.autograd.grad(y, leaves, g, create_graph=True)
        pulls = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed)) for t in first]
        slope = sum((t * pull).sum() for t, pull in zip(first, pulls, strict=True))
        second = torch.autograd.grad(slope, [*leaves, g], allow_unused=True)
        found.append([y, *statistics, *first, *(torch.zeros(()) if t is None else t for t in second)])
    for ours, torchs in zip(*found, strict=True):
        ours, torchs = torch.broadcast_tensors(ours, torchs)  # one may give zeros where the other gives nothing
        torch.testing.assert_close(ours, torchs, rtol=1e-8, atol=1e-10, check_dtype=False)


def test_gradgradcheck():
    x, gamma, beta = torch.randn(5, 2, 3).double(), torch.randn(2).double(), torch.randn(2).double()
    inputs = [t.requires_grad_() for t in (x, gamma, beta)]
    assert torch.autograd.gradgradcheck(lambda x, w, b: batch_norm(x, None, None, w, b, True), inputs)


def test_a_bias_without_a_weight():
    """Its gradient is the sum of g; torch loses how that depends on g."""
    x, g = (t.requires_grad_() for t in tensors((4, 3), 0))
    beta = torch.zeros(3, dtype=x.dtype, requires_grad=True)
    (found,) = torch.autograd.grad(batch_norm(x, None, None, None, beta, True), beta, g, create_graph=True)
    torch.testing.assert_close(found, g.sum(0))
    assert torch.equal(torch.autograd.grad(found.sum(), g)[0], torch.ones_like(g))


def test_where_neither_or_both_are_asked_for_it_is_torchs_function(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "native_batch_norm", lambda *arguments: calls.append(arguments))
    x, tangent = tensors((4, 3), 0)
    running = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    assert torch.equal(batch_norm(x, *running), F.batch_norm(x, *running))
    w = torch.ones(3, dtype=x.dtype, requires_grad=True)
    with forward_ad.dual_level():
        y = batch_norm(forward_ad.make_dual(x, tangent), *running, w)
        slope = forward_ad.unpack_dual(y).tangent.sum()
    assert torch.autograd.grad(slope, w)[0].shape == (3,)
    assert not calls


def test_a_single_value_a_channel_raises_as_torch_does():
    x = torch.ones(1, 3)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(forward_ad.make_dual(x, x), None, None, training=True)


def test_virtual_passes_use_it():
    from metakd._virtual.kernels import differentiable_kernels

    module = torch.nn.BatchNorm2d(2).double()
    x, tangent = tensors((3, 2, 4, 4), 0)
    names = []
    native = torch.native_batch_norm
    with pytest.MonkeyPatch.context() as patch, forward_ad.dual_level(), torch.no_grad():
        patch.setattr(torch, "native_batch_norm", lambda *arguments: names.append(1) or native(*arguments))
        with differentiable_kernels(module):
            module(forward_ad.make_dual(x, tangent))
    assert names == [1]
