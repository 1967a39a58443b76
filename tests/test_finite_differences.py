"""Derivatives by extrapolated central differences, against derivatives in closed form."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from metakd.check.finite_differences import derivative

NUMBER = st.floats(-3, 3)


@given(st.lists(NUMBER, min_size=1, max_size=8))
def test_polynomials(coefficients):
    found = derivative(lambda h: sum(c * h**k for k, c in enumerate(coefficients)))
    expected = coefficients[1] if len(coefficients) > 1 else 0.0
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.floats(0.1, 5), NUMBER, st.sampled_from([1e-8, 1.0, 1e8]))
def test_waves_and_exponentials_of_any_size(rate, phase, size):
    waves = derivative(lambda h: size * math.sin(rate * h + phase))
    assert waves == pytest.approx(size * rate * math.cos(phase), abs=1e-11 * size * rate)
    growth = derivative(lambda h: size * math.exp(rate * h))
    assert growth == pytest.approx(size * rate, rel=1e-11)


@given(NUMBER, NUMBER)
def test_functions_that_change_fast_within_the_first_step(a, b):
    """Truncation decides at the largest h, rounding at the smallest; neither wins."""
    found = derivative(lambda h: math.tanh(30 * h + a) + b)
    assert found == pytest.approx(30 / math.cosh(a) ** 2, abs=1e-7)


def test_a_constant_has_none():
    assert derivative(lambda h: 3.25) == 0.0


def test_an_even_function_with_a_kink_has_none_either():
    assert derivative(abs) == 0.0


def test_noise_does_not_win():
    """Errors of 1e-12 in the function are far from 1e-12 / h in the derivative."""
    noise = iter([1e-12, -1e-12, -1e-12] * 100)
    assert derivative(lambda h: math.exp(h) + next(noise)) == pytest.approx(1.0, abs=1e-9)


def test_no_function_is_evaluated_more_often_than_rows_allow():
    steps = []

    def function(h):
        steps.append(h)
        return math.exp(10 * h)

    derivative(function, step=0.1, shrink=2.0, rows=5)
    assert len(steps) <= 10
    assert set(map(abs, steps)) <= {0.1 / 2**row for row in range(5)}
    assert sorted(steps) == sorted(-h for h in steps)


def test_a_function_without_a_number_has_no_derivative():
    assert math.isnan(derivative(lambda h: math.nan))


def test_rounding_decides_beside_a_large_constant():
    """Steps that are too small agree with each other by chance only."""
    errors = [abs(derivative(lambda h, at=k / 50: 1e6 + math.sin(h + at)) - math.cos(k / 50)) for k in range(300)]
    assert max(errors) < 2e-8
