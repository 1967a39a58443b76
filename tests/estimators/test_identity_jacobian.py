"""`IdentityJacobian`: exact for one step, and off by learning rate times curvature for more."""

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st

from metakd import hypergradient
from metakd.estimators import Adjoint, IdentityJacobian
from tests.estimators.problems import RULES, Bilevel


def by(problem, estimator):
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator).gradient
    return torch.cat([g.flatten() for g in found.values()])


@given(rule=st.sampled_from(sorted(RULES)), unused=st.booleans(), direct=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_one_step_is_exact(rule, unused, direct, seed):
    problem = Bilevel(rule=rule, unused=unused, direct=direct, seed=seed)
    assert torch.equal(by(problem, IdentityJacobian()), by(problem, Adjoint()))


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_an_inner_loss_without_curvature_is_exact(momentum, decay):
    """Linear in theta: nothing is left out, momentum and decay are followed."""
    theta = {"x": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    phi = {"slope": torch.tensor([0.3, 0.7], dtype=torch.float64)}
    exact, found = (
        hypergradient(
            lambda p, m, batch: (m["slope"].sin() * p["x"]).sum(),
            lambda p, m: (p["x"] ** 3).sum(),
            theta,
            phi,
            range(5),
            optimizer=torchopt.sgd(lr=0.1, momentum=momentum, weight_decay=decay),
            estimator=estimator,
        ).gradient["slope"]
        for estimator in (Adjoint(), IdentityJacobian())
    )
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_the_closed_form_on_a_quadratic_and_the_order_of_the_error():
    """theta - c shrinks by 1 - lr a a step: exact 1 - (1 - lr a)^K, without the Hessian K lr a."""
    a, steps = torch.tensor([1.0, 2.0], dtype=torch.float64), 4
    errors = []
    for lr in (0.04, 0.02, 0.01):
        found = hypergradient(
            lambda p, m, batch: (a * (p["x"] - m["c"]) ** 2).sum() / 2,
            lambda p, m: p["x"].sum(),
            {"x": torch.ones(2, dtype=torch.float64)},
            {"c": torch.zeros(2, dtype=torch.float64)},
            range(steps),
            optimizer=torchopt.sgd(lr=lr),
            estimator=IdentityJacobian(),
        ).gradient["c"]
        torch.testing.assert_close(found, steps * lr * a, rtol=1e-12, atol=0)
        exact = 1 - (1 - lr * a) ** steps
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)
