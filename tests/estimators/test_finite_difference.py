"""`FiniteDifference` tends to the exact hypergradient as epsilon squared, and needs first derivatives alone."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from metakd import BilevelLossBalancer, MetaKDError, hypergradient, terms
from metakd.estimators import Adjoint, FiniteDifference
from tests.estimators.problems import RULES, Bilevel
from tests.tally import Tally
from tests.zoo import QUIET, meet

pytestmark = QUIET


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


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_error_of_one_side_falls_with_epsilon(rule, unused):
    problem = Bilevel(rule=rule, unused=unused, direct=True)
    exact = by(problem, Adjoint())
    errors = [
        ((by(problem, FiniteDifference(epsilon, sides=1)) - exact).norm() / exact.norm()).item()
        for epsilon in (2e-4, 1e-4, 1e-7)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[2] < 1e-5


@pytest.mark.parametrize(
    ("dtype", "sides", "limit"),
    [
        (torch.float64, 1, 1e-6),
        (torch.float64, 2, 1e-8),
        (torch.float32, 1, 5e-2),
        (torch.float32, 2, 5e-3),
    ],
)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_default_epsilon_suits_the_precision(rule, dtype, sides, limit):
    exact = by(Bilevel(rule=rule), Adjoint())
    found = by(Bilevel(rule=rule, dtype=dtype), FiniteDifference(sides=sides)).double()
    assert (found - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("sides", [1, 2])
def test_a_single_step_takes_no_gradients_of_the_student(sides):
    seen, problem = [], Bilevel()

    def spying(params, meta, batch):
        seen.append(any(p.requires_grad for p in params.values()))
        return problem.inner(params, meta, batch)

    _, *others = problem.arguments()
    hypergradient(spying, *others, optimizer=problem.torchopt(), estimator=FiniteDifference(sides=sides))
    assert seen == [True, False, False]  # the step itself, and two sides; one of them is known to a balancer


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("name", ["dropout", "batch_norm", "lstm_dropout", "moving_centre", "compiled_part"])
def test_both_sides_have_the_same_random_numbers_and_statistics(name, sides):
    influences, passes = [], Tally()
    for estimator in (Adjoint(), FiniteDifference(sides=sides)):
        student, batch, meta_batch = meet(name)
        student.register_forward_hook(lambda *_: passes(1))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
        balancer = BilevelLossBalancer(
            student,
            {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
            optimizer=optimizer,
            inner="mirror",
            estimator=estimator,
            verify=False,
        )
        torch.manual_seed(5)
        passes.seen.clear()
        balancer(batch, meta_batch)
        influences.append(balancer.report.influence)
    torch.testing.assert_close(influences[1], influences[0], rtol=1e-4, atol=1e-6)
    # The training pass, the meta batch and the sides. Nothing is taken over from compiled code, not even the gradient.
    assert len(passes.seen) == (5 if name == "compiled_part" else 2 + sides)


def test_one_side_is_for_one_step():
    problem = Bilevel(steps=2)
    with pytest.raises(MetaKDError, match=r"one inner step, got 2 batches; use sides=2"):
        by(problem, FiniteDifference(sides=1))
    with pytest.raises(MetaKDError, match="1 or 2 sides, not 3"):
        FiniteDifference(sides=3)


@pytest.mark.parametrize("sides", [1, 2])
def test_an_epsilon_lost_in_rounding_is_an_error(sides):
    problem = Bilevel(dtype=torch.float32, direct=True)  # the direct gradient alone would look like an answer
    with pytest.raises(MetaKDError, match=r"lost in the rounding of torch\.float32"):
        by(problem, FiniteDifference(1e-12, sides=sides))


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
