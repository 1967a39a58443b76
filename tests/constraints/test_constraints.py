"""Constraints hold for any free numbers, derivatives are exact, and `right_inverse` undoes the map."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from hypothesis import given
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from metakd import MetaKDError, constraints, hypergradient
from metakd.constraints import BoundedEigenvalues, Positive, Simplex
from metakd.estimators import Adjoint, FiniteDifference, OneStep, Unroll

MAPS = {"positive": Positive(), "simplex": Simplex(), "bounded": BoundedEigenvalues(0.02, 30.0)}
SEEDS, SIZES = st.integers(0, 10**6), st.integers(1, 5)
SCALES = st.floats(-6, 6).map(lambda power: 10**power)


def free(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MAPS)
@given(seed=SEEDS, batch=st.integers(1, 3), size=SIZES)
def test_right_inverse_undoes_the_map(name, seed, batch, size):
    value = MAPS[name](free(seed, batch, size, size))
    torch.testing.assert_close(MAPS[name](MAPS[name].right_inverse(value)), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [1, 3])
def test_derivatives_are_exact(name, size):
    x = free(1, 2, size, size).requires_grad_()
    assert gradcheck(MAPS[name], x, check_forward_ad=True)
    assert gradgradcheck(MAPS[name], x)


def test_where_eigenvalues_meet_or_lie_far_apart_too():
    bounded = BoundedEigenvalues(0.02, 30.0)
    for x in (torch.zeros(3, 3), torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 2.0])), 3 * free(5, 3, 3)):
        x = x.double().requires_grad_()
        assert gradcheck(bounded, x)
        assert gradgradcheck(bounded, x)


@given(SEEDS, SIZES, SCALES, st.floats(0.1, 6))
def test_eigenvalues_stay_within_the_bounds(seed, size, scale, decades):
    bounded = BoundedEigenvalues(1e-3, 1e-3 * 10**decades)
    found = bounded(free(seed, size, size, scale=scale))
    torch.testing.assert_close(found, found.mT)
    eigenvalues = torch.linalg.eigvalsh(found)
    rounding = 1e-13 * bounded.high * max(1.0, math.log10(scale))
    assert eigenvalues.min() >= bounded.low - rounding
    assert eigenvalues.max() <= bounded.high + rounding


@given(SEEDS, SIZES, SCALES)
def test_it_is_the_function_of_the_eigenvalues(seed, size, scale):
    x = free(seed, size, size, scale=scale)
    eigenvalues, vectors = torch.linalg.eigh((x + x.mT) / 2)
    reach = math.log(30.0 / 0.02) / 2
    wanted = math.sqrt(30.0 * 0.02) * (reach * (eigenvalues / reach).tanh()).exp()
    found = BoundedEigenvalues(0.02, 30.0)(x)
    # What eigh loses in eigenvalues of this size is left to it.
    torch.testing.assert_close(found, (vectors * wanted) @ vectors.mT, rtol=0, atol=1e-11 * max(1.0, scale))


def test_in_the_middle_it_is_the_exponential():
    x = 1e-3 * free(2, 3, 3)
    x = (x + x.mT) / 2
    torch.testing.assert_close(BoundedEigenvalues(0.01, 100.0)(x), torch.linalg.matrix_exp(x), rtol=0, atol=1e-8)


@given(SEEDS, st.floats(-3, 2.5))
def test_positive_and_simplex_hold(seed, power):
    x = free(seed, 3, 4, scale=10**power)
    assert bool((Positive()(x / x.abs().max() * 300) > 0).all())
    for dim in (0, 1):
        shares = Simplex(dim)(x)
        assert bool((shares >= 0).all())
        torch.testing.assert_close(shares.sum(dim), torch.ones_like(shares.sum(dim)))


@pytest.mark.parametrize("name", MAPS)
def test_as_a_parametrization(name):
    """Starts where the parameter was, can be set, and is trained within its constraint."""
    start = MAPS[name](free(3, 3, 3))
    layer = nn.Linear(3, 3, bias=False).double()
    layer.weight.data = start.clone()
    parametrize.register_parametrization(layer, "weight", MAPS[name])
    torch.testing.assert_close(layer.weight.detach(), start)
    wanted = MAPS[name](free(4, 3, 3))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(300):
        loss = (layer.weight - wanted).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-2, atol=1e-2)
    layer.weight = start
    torch.testing.assert_close(layer.weight.detach(), start)


@pytest.mark.parametrize("name", MAPS)
def test_inside_of_a_hypergradient(name):
    """As meta-parameter and as inner parameter: all exact estimators agree."""
    found = [
        hypergradient(
            lambda p, m, batch: (MAPS[name](p["w"]) - MAPS[name](m["phi"])).pow(2).sum() / 2,
            lambda p, m: MAPS[name](p["w"]).pow(2).sum(),
            {"w": free(7, 2, 2)},
            {"phi": free(8, 2, 2)},
            [None] * (1 if isinstance(estimator, OneStep) else 3),
            optimizer=torchopt.sgd(lr=0.01),
            estimator=estimator,
        ).gradient["phi"]
        for estimator in (OneStep("forward"), OneStep("reverse"), Unroll(), Adjoint(), FiniteDifference(1e-5))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[4], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Positive().right_inverse(torch.tensor([1.0, 0.0])), "smallest entry is 0"),
        (lambda: Positive().right_inverse(torch.tensor([1.0, math.inf])), "largest inf"),
        (lambda: Simplex().right_inverse(torch.tensor([0.5, 0.6])), "sums from 1.1"),
        (lambda: Simplex().right_inverse(torch.tensor([1.5, -0.5])), "smallest entry -0.5"),
        (lambda: BoundedEigenvalues(2.0, 1.0), "0 < low < high"),
        (lambda: BoundedEigenvalues(0.0, 1.0), "0 < low < high"),
        (lambda: BoundedEigenvalues(0.1, 1.0)(torch.ones(2, 3)), "square"),
        (lambda: BoundedEigenvalues(0.1, 1.0)(torch.ones(3)), "square"),
        (lambda: BoundedEigenvalues(0.1, 1.0)(torch.full((1, 1), math.nan)), "NaN"),
        (lambda: BoundedEigenvalues(0.1, 1.0).right_inverse(torch.eye(2)), "strictly inside"),
        (lambda: BoundedEigenvalues(0.1, 1.0).right_inverse(torch.tensor([[0.5, 0.1], [0.0, 0.5]])), "not symmetric"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(MetaKDError, match=message):
        act()


def test_the_names_are_exported():
    assert set(constraints.__all__) == {"BoundedEigenvalues", "Positive", "Simplex"}
