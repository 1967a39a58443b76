"""`FiniteDifference` tends to the exact hypergradient as epsilon squared, and needs first derivatives alone."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from metakd import BilevelLossBalancer, MetaKDError, hypergradient, terms
from metakd.estimators import Adjoint, FiniteDifference
from tests.estimators.problems import RULES, Bilevel
from tests.zoo import meet


def by(problem, estimator):
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator).gradient
    return torch.cat([g.flatten() for g in found.values()])


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_error_falls_with_epsilon_squared(rule, steps, unused):
    problem = Bilevel(rule=rule, steps=steps, unused=unused, direct=True)
    exact = by(problem, Adjoint())
    errors = [
        ((by(problem, FiniteDifference(epsilon)) - exact).norm() / exact.norm()).item()
        for epsilon in (2e-3, 1e-3, 1e-5)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[2] < 1e-7


class Once(torch.autograd.Function):
    """tanh with neither a second derivative nor a forward-mode formula."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


def test_a_model_without_second_derivatives():
    """The same numbers as the model with torch's own tanh by the exact way."""
    influences = []
    for activation, estimator in ((torch.tanh, Adjoint()), (Once.apply, FiniteDifference(1e-5))):
        student, batch, meta_batch = meet("mlp")
        student[1].forward = activation
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
        balancer = BilevelLossBalancer(
            student, [terms.CrossEntropy()], optimizer=optimizer, inner="mirror", estimator=estimator
        )
        balancer(batch, meta_batch)
        influences.append(balancer.report.influence)
    torch.testing.assert_close(influences[1], influences[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("epsilon", [0, -1.0, float("inf"), float("nan"), "small"])
def test_epsilon_is_a_positive_number(epsilon):
    with pytest.raises(MetaKDError, match="positive number"):
        FiniteDifference(epsilon)
