"""The update rules against formulas, torch.optim's functions, and numerical derivatives."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from metakd import MetaKDError
from metakd.inner.updates import adam_step, clip_norm, momentum_step

SEED = st.integers(0, 2**31 - 1)
SHAPES = ((2, 3), (4,), ())
ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-2}


def draw(seed, *, requires_grad=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [t.requires_grad_(requires_grad) for t in drawn]


def zeros(dtype=torch.float64):
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@given(SEED, st.sampled_from([0.5, 0.9]), st.sampled_from([0.0, 0.3]), st.booleans())
def test_momentum(seed, momentum, dampening, nesterov):
    g, b = draw(seed), draw(seed + 1)
    rule = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    updates, buffers, started = momentum_step(g, b, [True, False, True], **rule)
    expected = [
        momentum * b[0] + (1 - dampening) * g[0],
        g[1],  # a buffer that has not started takes the gradient as it is
        momentum * b[2] + (1 - dampening) * g[2],
    ]
    assert_close(buffers, expected)
    assert_close(updates, [x + momentum * y for x, y in zip(g, expected, strict=True)] if nesterov else expected)
    assert started == [True, True, True]


@given(SEED, st.integers(0, 20), st.sampled_from([0.0, 1e-3]))
def test_adam(seed, count, eps_root):
    g, m, v = draw(seed), draw(seed + 1), [t**2 for t in draw(seed + 2)]
    counts = [torch.tensor(count + i) for i in range(3)]
    updates, first, second, now = adam_step(g, m, v, counts, **ADAM, eps_root=eps_root)
    b1, b2, eps = ADAM.values()
    assert_close(first, [b1 * a + (1 - b1) * x for a, x in zip(m, g, strict=True)])
    assert_close(second, [b2 * a + (1 - b2) * x**2 for a, x in zip(v, g, strict=True)])
    assert [int(c) for c in now] == [count + i + 1 for i in range(3)]
    for i, update in enumerate(updates):
        t = count + i + 1
        root = (second[i] / (1 - b2**t) + eps_root).sqrt()
        torch.testing.assert_close(update, first[i] / (1 - b1**t) / (root + eps), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays_for_parameters_without_dimensions_too(dtype):
    g = draw(0, dtype=dtype)
    counts = [torch.tensor(3)] * 3
    updates, first, second, _ = adam_step(g, zeros(dtype), zeros(dtype), counts, **ADAM)
    moved, buffers, _ = momentum_step(g, zeros(dtype), [True] * 3, momentum=0.9, dampening=0.1, nesterov=True)
    clipped = clip_norm([*g, torch.ones(2, dtype=torch.float64)], max_norm=0.1)[:3]
    for results in (updates, first, second, moved, buffers, clipped):
        assert [t.dtype for t in results] == [dtype] * 3
        assert [t.shape for t in results] == [torch.Size(shape) for shape in SHAPES]


@settings(max_examples=15)
@given(SEED)
def test_derivatives_are_numerical_ones(seed):
    """In gradients and states alike, with a clip in front."""
    g, b, v = (draw(seed + i, requires_grad=True) for i in range(3))
    counts = [torch.tensor(2)] * 3

    def momentum(*tensors):
        clipped = clip_norm(tensors[:3], max_norm=0.7)
        return tuple(momentum_step(clipped, tensors[3:], [True] * 3, momentum=0.9, dampening=0.1, nesterov=True)[0])

    def adam(*tensors):
        squares = [t**2 + 0.1 for t in tensors[6:]]
        return tuple(adam_step(tensors[:3], tensors[3:6], squares, counts, **ADAM)[0])

    assert gradcheck(momentum, (*g, *b))
    assert gradcheck(adam, (*g, *b, *v))


def test_nothing_is_written_to():
    g, b, v = draw(0), draw(1), [t**2 for t in draw(2)]
    before = [t.clone() for t in (*g, *b, *v)]
    momentum_step(g, b, [True] * 3, momentum=0.9, dampening=0.0, nesterov=True)
    adam_step(g, b, v, [torch.tensor(1)] * 3, **ADAM)
    clip_norm(g, max_norm=0.1)
    assert all(torch.equal(x, y) for x, y in zip((*g, *b, *v), before, strict=True))


def test_adam_where_nothing_ever_arrived_has_the_slope_of_its_denominator():
    """For g near 0 the direction of the first step is g / (|g| + eps), whose slope at 0 is 1 / eps."""
    g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    zero = [torch.zeros(3, dtype=torch.float64)]
    rule = {**ADAM, "eps": 0.25}

    def direction(g):
        return adam_step([g], zero, zero, [torch.tensor(0)], **rule)[0][0]

    (slope,) = torch.autograd.grad(direction(g).sum(), g)
    torch.testing.assert_close(slope, torch.full_like(slope, 4.0))
    h = 1e-9
    numerical = (direction(torch.full_like(slope, h)) - direction(torch.full_like(slope, -h))) / (2 * h)
    torch.testing.assert_close(slope, numerical, rtol=1e-7, atol=0)


def test_adam_where_a_dead_unit_had_momentum_once():
    """m may be left over while v is not: the direction is m / eps, and finite."""
    g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    m, v = [torch.ones(1, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]
    (direction,), *_ = adam_step([g], m, v, [torch.tensor(5)], **ADAM)
    assert direction.item() == pytest.approx(0.8 / (1 - 0.8**6) / 1e-2)
    assert torch.autograd.grad(direction, g)[0].isfinite().all()


@given(SEED, st.sampled_from([1.0, 2.0, 3.0, float("inf")]), st.sampled_from([1e-3, 0.5, 2.0, 1e3]))
def test_clipping_is_torchs(seed, norm_type, max_norm):
    g = draw(seed)
    leaves = [torch.zeros_like(x).requires_grad_() for x in g]
    for leaf, x in zip(leaves, g, strict=True):
        leaf.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(leaves, max_norm, norm_type)
    assert_close(clip_norm(g, max_norm=max_norm, norm_type=norm_type), [leaf.grad for leaf in leaves])


@given(SEED, st.sampled_from([1.0, 2.0, 3.0, float("inf")]))
def test_the_clip_factor_is_differentiated(seed, norm_type):
    g = draw(seed, requires_grad=True)
    assert gradcheck(lambda *g: tuple(clip_norm(g, max_norm=0.3, norm_type=norm_type)), g)


def test_clipping_zero_gradients_has_finite_derivatives():
    g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (clipped,) = clip_norm([g], max_norm=1.0)
    assert torch.equal(torch.autograd.grad(clipped.sum(), g)[0], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_what_is_not_finite_raises_on_demand(bad):
    g = [torch.tensor([1.0, bad])]
    with pytest.raises(MetaKDError, match=f"norm of order 2.0 is {bad}"):
        clip_norm(g, max_norm=1.0, error_if_nonfinite=True)
    assert not clip_norm(g, max_norm=1.0)[0].isfinite().all()
    clip_norm([torch.ones(2)], max_norm=1.0, error_if_nonfinite=True)


def test_a_gradient_of_none_has_no_update_and_keeps_its_state():
    g, b = [torch.ones(2), None], [torch.full((2,), 3.0), torch.full((2,), 4.0)]
    updates, buffers, started = momentum_step(g, b, [True, False], momentum=0.5, dampening=0.0, nesterov=True)
    assert updates[1] is None and buffers[1] is b[1] and started == [True, False]
    torch.testing.assert_close(updates[0], torch.full((2,), 2.25))
    counts = [torch.tensor(1), torch.tensor(7)]
    updates, first, second, now = adam_step(g, b, b, counts, **ADAM)
    assert updates[1] is None and first[1] is b[1] and second[1] is b[1] and now[1] is counts[1]
    assert updates[0] is not None and int(now[0]) == 2
    clipped = clip_norm([None, torch.tensor([3.0, 4.0])], max_norm=1.0)
    assert clipped[0] is None and clipped[1].norm() == pytest.approx(1.0, abs=1e-6)
    assert clip_norm([None, None], max_norm=1.0) == [None, None]
    assert clip_norm([], max_norm=1.0) == []
