"""Conjugate gradients and the Neumann series against dense solves, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metakd import MetaKDError
from metakd.inner import conjugate_gradient, neumann_series


def system(size, seed, condition=20.0):
    """A symmetric positive definite matrix of that condition number, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, 1, size, base=condition, dtype=torch.float64)
    return basis @ values.diag() @ basis.T, torch.randn(size, generator=generator, dtype=torch.float64)


def error(found, a, b, damping=0.0):
    expected = torch.linalg.solve(a + damping * torch.eye(len(b), dtype=b.dtype), b)
    return ((found - expected).norm() / expected.norm()).item()


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 5.0]))
@settings(max_examples=40)
def test_conjugate_gradients_are_exact_after_as_many_steps_as_dimensions(size, seed, damping):
    a, b = system(size, seed)
    assert error(conjugate_gradient(lambda v: a @ v, b, steps=2 * size, damping=damping), a, b, damping) < 1e-9


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([0.0, 0.3]))
@settings(max_examples=20)
def test_the_neumann_series_is_its_partial_sum(size, seed, damping):
    a, b = system(size, seed)
    identity = torch.eye(size, dtype=b.dtype)
    m = identity - 0.04 * (a + damping * identity)
    expected = 0.04 * sum(torch.linalg.matrix_power(m, j) @ b for j in range(8))
    found = neumann_series(lambda v: a @ v, b, steps=7, damping=damping, step_size=0.04)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=20)
def test_the_neumann_series_finds_a_step_size_by_itself(size, seed):
    a, b = system(size, seed)
    assert error(neumann_series(lambda v: a @ v, b, steps=1000, damping=0.0, step_size=None), a, b) < 1e-9


def test_one_product_a_step_and_none_for_nothing():
    a, b = system(30, 0)
    calls = []

    def matvec(v):
        calls.append(1)
        return a @ v

    conjugate_gradient(matvec, b, steps=5, damping=0.0)
    assert len(calls) == 5
    calls.clear()
    neumann_series(matvec, b, steps=5, damping=0.0, step_size=0.01)
    assert len(calls) == 5


INDEFINITE = torch.tensor([[1.0, 0.0], [0.0, -0.5]], dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)


def test_conjugate_gradients_refuse_negative_curvature_until_it_is_damped():
    with pytest.raises(MetaKDError, match=r"curvature -.*Set a damping above"):
        conjugate_gradient(lambda v: INDEFINITE @ v, ONES, steps=5, damping=0.0)
    assert error(conjugate_gradient(lambda v: INDEFINITE @ v, ONES, steps=5, damping=0.6), INDEFINITE, ONES, 0.6) < 1e-9


def test_conjugate_gradients_refuse_a_flat_direction():
    with pytest.raises(MetaKDError, match="curvature 0"):
        conjugate_gradient(lambda v: 0 * v, ONES, steps=5, damping=0.0)


@pytest.mark.parametrize("step_size", [0.5, None])
def test_the_neumann_series_refuses_negative_curvature(step_size):
    with pytest.raises(MetaKDError, match="diverges"):
        neumann_series(lambda v: INDEFINITE @ v, ONES, steps=50, damping=0.0, step_size=step_size)


def test_the_neumann_series_refuses_too_long_a_step():
    with pytest.raises(MetaKDError, match=r"step_size=3 .*smaller one"):
        neumann_series(lambda v: v, ONES, steps=5, damping=0.0, step_size=3.0)


def test_the_neumann_series_refuses_a_flat_direction():
    with pytest.raises(MetaKDError, match="flat"):
        neumann_series(lambda v: 0 * v, ONES, steps=5, damping=0.0, step_size=None)


def test_a_damped_flat_direction_is_solved():
    found = conjugate_gradient(lambda v: 0 * v, ONES, steps=5, damping=2.0)
    torch.testing.assert_close(found, ONES / 2)
