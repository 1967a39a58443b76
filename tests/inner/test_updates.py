"""The update rules against formulas, torch.optim's functions, and numerical derivatives."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from metakd import MetaKDError
from metakd.inner.updates import (
    adam_direction,
    clip_norm,
    mean,
    mean_square,
    momentum_step,
    over_root,
    radam_direction,
)

SEED = st.integers(0, 2**31 - 1)
SHAPES = ((2, 3), (4,), ())
RADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-2}


def draw(seed, *, requires_grad=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [t.requires_grad_(requires_grad) for t in drawn]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@given(SEED, st.sampled_from([0.5, 0.9]), st.sampled_from([0.0, 0.3]), st.booleans())
def test_momentum(seed, momentum, dampening, nesterov):
    rule = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    for g, b in zip(draw(seed), draw(seed + 1), strict=True):
        for buffer in (b, None):
            # A buffer that has not started takes the gradient as it is.
            expected = g if buffer is None else momentum * b + (1 - dampening) * g
            update, after = momentum_step(g, buffer, **rule)
            assert_close([update, after], [g + momentum * expected if nesterov else expected, expected])


@given(SEED, st.sampled_from([0.0, 0.5, 0.9]))
def test_averages(seed, decay):
    for g, a in zip(draw(seed), draw(seed + 1), strict=True):
        assert_close([mean(a, g, decay)], [decay * a + (1 - decay) * g])
        assert_close([mean_square(a, g, decay)], [decay * a + (1 - decay) * g**2])


@given(SEED, st.integers(1, 20), st.sampled_from([0.0, 1e-3]), st.booleans())
def test_adam(seed, t, eps_root, as_tensors):
    corrections = [1 - b ** (torch.tensor(float(t), dtype=torch.float64) if as_tensors else t) for b in (0.8, 0.9)]
    for m, v in zip(draw(seed), draw(seed + 1), strict=True):
        found = adam_direction(m, v**2, corrections, eps=1e-2, eps_root=eps_root)
        root = (v**2 / (1 - 0.9**t) + eps_root).sqrt()
        assert_close([found], [m / (1 - 0.8**t) / (root + 1e-2)])


@given(SEED, st.integers(1, 20))
def test_radam(seed, t):
    """The variance is known well enough from the sixth step on."""
    b1, b2, eps = RADAM.values()
    longest = 2 / (1 - b2) - 1
    rho = longest - 2 * t * b2**t / (1 - b2**t)
    assert (rho > 5) == (t > 5)
    for m, v in zip(draw(seed), draw(seed + 1), strict=True):
        expected = m / (1 - b1**t)
        if t > 5:
            rectified = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
            expected = expected * rectified**0.5 * (1 - b2**t) ** 0.5 / (v.abs() + eps)
        assert_close([radam_direction(m, v**2, t, **RADAM)], [expected])
        assert_close([radam_direction(m, v**2, t, b1=b1, b2=0.5, eps=eps)], [m / (1 - b1**t)])  # never


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays_for_parameters_without_dimensions_too(dtype):
    g, v = draw(0, dtype=dtype), [t**2 for t in draw(1, dtype=dtype)]
    corrections = [1 - b ** torch.tensor(3.0, dtype=torch.float64) for b in (0.8, 0.9)]
    results = [
        [adam_direction(x, y, corrections, eps=1e-2) for x, y in zip(g, v, strict=True)],
        [radam_direction(x, y, 7, **RADAM) for x, y in zip(g, v, strict=True)],
        [mean(x, y, 0.9) for x, y in zip(g, v, strict=True)],
        [mean_square(x, y, 0.9) for x, y in zip(g, v, strict=True)],
        [momentum_step(x, y, momentum=0.9, dampening=0.1, nesterov=True)[0] for x, y in zip(g, v, strict=True)],
        clip_norm([*g, torch.ones(2, dtype=torch.float64)], max_norm=0.1)[:3],
    ]
    for found in results:
        assert [t.dtype for t in found] == [dtype] * 3
        assert [t.shape for t in found] == [torch.Size(shape) for shape in SHAPES]


@settings(max_examples=15)
@given(SEED)
def test_derivatives_are_numerical_ones(seed):
    """In gradients and states alike, with a clip in front."""
    g, b, v = (draw(seed + i, requires_grad=True) for i in range(3))

    def momentum(*tensors):
        clipped = clip_norm(tensors[:3], max_norm=0.7)
        rule = {"momentum": 0.9, "dampening": 0.1, "nesterov": True}
        return tuple(momentum_step(g, b, **rule)[0] for g, b in zip(clipped, tensors[3:], strict=True))

    def adaptive(direction):
        def step(*tensors):
            rows = zip(tensors[:3], tensors[3:6], tensors[6:], strict=True)
            return tuple(direction(mean(b, g, 0.8), mean_square(v**2 + 0.1, g, 0.9)) for g, b, v in rows)

        return step

    assert gradcheck(momentum, (*g, *b))
    assert gradcheck(adaptive(lambda m, v: adam_direction(m, v, (0.5, 0.25), eps=1e-2)), (*g, *b, *v))
    assert gradcheck(adaptive(lambda m, v: radam_direction(m, v, 7, **RADAM)), (*g, *b, *v))


def test_nothing_is_written_to():
    g, b, v = draw(0), draw(1), [t**2 for t in draw(2)]
    before = [t.clone() for t in (*g, *b, *v)]
    for x, y, z in zip(g, b, v, strict=True):
        momentum_step(x, y, momentum=0.9, dampening=0.0, nesterov=True)
        mean(y, x, 0.9), mean_square(z, x, 0.9), over_root(x, z, 1e-2)
        adam_direction(y, z, (0.5, 0.5), eps=1e-2), radam_direction(y, z, 7, **RADAM)
    clip_norm(g, max_norm=0.1)
    assert all(torch.equal(x, y) for x, y in zip((*g, *b, *v), before, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.25, 1e-3])
def test_where_nothing_ever_arrived_the_slope_is_that_of_the_denominator(share):
    """For v = share g^2 the quotient is g / (sqrt(share) |g| + eps), whose slope at 0 is 1 / eps."""
    g = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def direction(g):
        return over_root(g, share * g * g, 0.25)

    (slope,) = torch.autograd.grad(direction(g).sum(), g)
    torch.testing.assert_close(slope, torch.full_like(slope, 4.0))
    h = 1e-9
    numerical = (direction(torch.full_like(slope, h)) - direction(torch.full_like(slope, -h))) / (2 * h)
    torch.testing.assert_close(slope, numerical, rtol=1e-7, atol=0)


def test_where_a_dead_unit_had_momentum_once():
    """m may be left over while v is not: the direction is m / eps, and its kink has the slope zero, in the middle."""
    g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    m = torch.ones(1, dtype=torch.float64)
    direction = over_root(m, g * g, 1e-2)
    assert direction.item() == 100.0
    assert torch.autograd.grad(direction, g)[0].item() == 0.0


def test_a_negative_variance_stays_an_error_to_see():
    """As in torch, where rounding makes the centered variance of RMSprop negative."""
    assert over_root(torch.ones(1), torch.tensor([-1e-9]), 1e-2).isnan().all()


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


def test_clipping_with_a_gradient_of_none():
    clipped = clip_norm([None, torch.tensor([3.0, 4.0])], max_norm=1.0)
    assert clipped[0] is None and clipped[1].norm() == pytest.approx(1.0, abs=1e-6)
    assert clip_norm([None, None], max_norm=1.0) == [None, None]
    assert clip_norm([], max_norm=1.0) == []
