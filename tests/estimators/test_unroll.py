"""`Unroll` against an unroll written by hand, central differences through torch.optim, and closed forms."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from hypothesis import given, settings

from metakd import MetaKDError, hypergradient
from metakd.estimators import Unroll
from metakd.estimators.bilevel import build_problem
from tests.estimators.problems import RULES, Bilevel, assert_slope, problems, relative


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4).flatmap(lambda steps: problems(steps=steps)))
def test_k_steps_are_plain_double_backward_and_central_differences(problem):
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=Unroll())
    expected = problem.double_backward()
    assert relative(found.gradient, expected.gradient) < 1e-10
    assert relative(found.params, expected.params) < 1e-12
    torch.testing.assert_close(found.outer_loss, expected.outer_loss, rtol=1e-12, atol=0)
    assert_slope(found.gradient, problem)


@pytest.mark.parametrize("rule", RULES)
def test_float32(rule):
    expected = Bilevel(rule=rule, steps=3).double_backward()
    problem = Bilevel(rule=rule, steps=3, dtype=torch.float32)
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=Unroll())
    assert {g.dtype for g in found.gradient.values()} == {torch.float32}
    assert relative(found.gradient, expected.gradient) < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_steps_taken_in_two_goes_end_where_all_at_once_do(rule):
    """The state that comes back is the state to go on from."""
    problem = Bilevel(rule=rule, steps=4, unused=True)
    inner, outer, params, meta_params, batches = problem.arguments()
    optimizer = problem.torchopt()
    whole = hypergradient(inner, outer, params, meta_params, batches, optimizer=optimizer)
    first = hypergradient(inner, outer, params, meta_params, batches[:1], optimizer=optimizer)
    rest = hypergradient(
        inner,
        outer,
        first.params,
        meta_params,
        batches[1:],
        optimizer=optimizer,
        optimizer_state=first.optimizer_state,
    )
    assert relative(rest.params, whole.params) < 1e-12
    torch.testing.assert_close(rest.outer_loss, whole.outer_loss, rtol=1e-12, atol=0)


@given(st.integers(1, 6), st.floats(0.01, 0.9), st.floats(-2, 2).filter(lambda phi: abs(phi) > 1e-3))
def test_closed_form_of_gradient_descent_on_a_parabola(steps, lr, phi):
    """theta_K = phi + (1 - lr)^K (theta - phi), so that d theta_K / d phi = 1 - (1 - lr)^K."""
    theta = {"x": torch.tensor(3.0, dtype=torch.float64)}
    meta = {"phi": torch.tensor(phi, dtype=torch.float64)}
    found = hypergradient(
        lambda p, m, batch: (p["x"] - m["phi"]) ** 2 / 2,
        lambda p, m: 5 * p["x"],
        theta,
        meta,
        range(steps),
        optimizer=torchopt.sgd(lr=lr),
        estimator=Unroll(),
    )
    left = (1 - lr) ** steps
    assert found.params["x"].item() == pytest.approx(phi + left * (3 - phi), rel=1e-12, abs=1e-12)
    assert found.gradient["phi"].item() == pytest.approx(5 * (1 - left), rel=1e-12)


def test_the_batches_are_taken_in_order():
    seen = []

    def inner(p, m, batch):
        seen.append(batch)
        return (p["x"] - m["phi"]) ** 2 * batch

    hypergradient(
        inner,
        lambda p, m: p["x"],
        {"x": torch.tensor(1.0)},
        {"phi": torch.tensor(0.5)},
        iter([1.0, 2.0, 3.0]),
        optimizer=torchopt.sgd(lr=0.1),
        estimator=Unroll(),
    )
    assert seen == [1.0, 2.0, 3.0]


def test_a_nan_names_its_step():
    with pytest.raises(MetaKDError, match="the inner loss of step 2 is nan"):
        hypergradient(
            lambda p, m, batch: p["x"] * m["phi"] * batch,
            lambda p, m: p["x"],
            {"x": torch.tensor(1.0)},
            {"phi": torch.tensor(0.5)},
            [1.0, 1.0, float("nan")],
            optimizer=torchopt.sgd(lr=0.1),
            estimator=Unroll(),
        )


def test_no_batches_are_an_error():
    problem = build_problem(*Bilevel().arguments(), torchopt.sgd(lr=0.1))
    problem = dataclasses.replace(problem, batches=[])
    with pytest.raises(MetaKDError, match="at least one batch"):
        Unroll()(problem)
