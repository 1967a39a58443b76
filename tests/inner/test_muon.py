"""The mirror of torch.optim.Muon, whose iteration torch rounds to bfloat16."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from metakd import MetaKDError
from metakd.inner import apply, mirror
from metakd.inner.rules.muon import orthogonalised

TORCHS = (3.4445, -4.7750, 2.0315)
SHAPES = ((3, 3), (5, 2), (2, 5), (1, 4), (4, 1))
Muon = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="this torch has no Muon")


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.integers(0, 6))
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape, seed, steps):
    g = matrix(shape, seed)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = TORCHS[0] * s + TORCHS[1] * s**3 + TORCHS[2] * s**5
    torch.testing.assert_close(orthogonalised(g, TORCHS, steps, 1e-7), u * s @ v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_derivative(shape):
    assert gradcheck(lambda g: orthogonalised(g, TORCHS, 5, 1e-7), matrix(shape).requires_grad_())


def test_where_the_gradient_is_zero():
    """Below eps the norm does not divide, so that the iteration is linear at zero: a^steps / eps."""
    g = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: orthogonalised(g, TORCHS, 3, 0.5), g)
    (slope,) = torch.autograd.grad(orthogonalised(g, TORCHS, 3, 0.5)[0, 1], g)
    expected = torch.zeros_like(slope)
    expected[0, 1] = TORCHS[0] ** 3 / 0.5
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_iterates_in_float32(dtype):
    g = matrix((4, 3)).to(dtype)
    found = orthogonalised(g, TORCHS, 5, 1e-7)
    assert found.dtype == dtype
    torch.testing.assert_close(found, orthogonalised(g.double(), TORCHS, 5, 1e-7).to(dtype))


GROUP = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 0.5]),
        "momentum": st.sampled_from([0.0, 0.5, 0.95]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "ns_coefficients": st.sampled_from([TORCHS, (1.5, -0.5, 0.0)]),
        "ns_steps": st.sampled_from([1, 5]),
        "eps": st.sampled_from([1e-7, 1.0]),
        "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
    }
)


def mirrored_and_real(groups, seed, warm, steps):
    """The parameters after each virtual step, and after each real one."""
    params = {f"{i}.{j}": torch.nn.Parameter(matrix(s, seed)) for i in range(len(groups)) for j, s in enumerate(SHAPES)}
    optimizer = Muon(
        [{"params": [params[f"{i}.{j}"] for j in range(len(SHAPES))], **group} for i, group in enumerate(groups)]
    )

    def gradients(t):
        drawn = {name: matrix(p.shape, seed + 7 * t + i) for i, (name, p) in enumerate(params.items())}
        return {**drawn, "0.2": None if t % 2 else drawn["0.2"]}

    def real_step(t):
        for name, g in gradients(t).items():
            params[name].grad = None if g is None else g.clone()
        optimizer.step()

    for t in range(warm):
        real_step(t)
    inner = mirror(optimizer, params)
    at, state, pairs = {name: p.detach().clone() for name, p in params.items()}, inner.state, []
    for t in range(warm, warm + steps):
        at, state = apply(inner.transformation, gradients(t), state, at)
        pairs.append(at)
    for virtual, t in zip(pairs, range(warm, warm + steps), strict=True):
        real_step(t)
        yield virtual, {name: p.detach().clone() for name, p in params.items()}


@needs_muon
@settings(max_examples=40)
@given(st.lists(GROUP, min_size=1, max_size=2), st.integers(0, 1000), st.integers(0, 2), st.integers(1, 3))
def test_k_steps_are_those_of_torch_without_its_rounding(groups, seed, warm, steps):
    """torch's own step, with its iteration in float64."""
    module = pytest.importorskip("torch.optim._muon")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_zeropower_via_newtonschulz", orthogonalised)
    with patch.context():
        for virtual, real in mirrored_and_real(groups, seed, warm, steps):
            torch.testing.assert_close(virtual, real, rtol=1e-12, atol=1e-12)
    patch.undo()


@needs_muon
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("nesterov", [False, True])
def test_k_steps_are_those_of_torch_to_bfloat16(warm, nesterov):
    group = {"lr": 0.1, "nesterov": nesterov, "ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 3}
    for virtual, real in mirrored_and_real([group], 1, warm, 3):
        torch.testing.assert_close(virtual, real, rtol=0, atol=3 * 0.1 * 2**-8 * 4)


@needs_muon
def test_empty_matrices_and_a_rate_in_a_tensor():
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in {"a": (0, 3), "b": (2, 2)}.items()}
    inner = mirror(Muon(params.values(), lr=torch.tensor(0.25)), params)
    moved, _ = apply(inner.transformation, {n: torch.zeros_like(p) for n, p in params.items()}, inner.state, params)
    assert all(torch.equal(moved[name], p) for name, p in params.items())


@needs_muon
def test_what_it_does_not_move():
    w = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(MetaKDError, match=r"no real matrix, but of shape \(2, 2, 2\).*AdamW"):
        mirror(Muon([w]), {"w": w})
    w = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([w])
    optimizer.param_groups[0]["adjust_lr_fn"] = "new"
    with pytest.raises(MetaKDError, match=r"does not know Muon's adjust_lr_fn='new'; .*'match_rms_adamw'"):
        mirror(optimizer, {"w": w})
