"""`Adjoint` is `Unroll` without its memory; `Truncated` tends to it."""

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, hypergradient, terms
from metakd.batch import tensors
from tests.estimators.problems import RULES, Bilevel
from tests.zoo import ZOO, meet


def by(problem, estimator, **options):
    return hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator, **options)


def flat(result):
    return torch.cat([g.flatten() for g in result.gradient.values()])


@given(
    batch_size=st.integers(1, 4),
    losses=st.integers(1, 5),
    steps=st.integers(1, 5),
    rule=st.sampled_from(sorted(RULES)),
    frozen=st.booleans(),
    unused=st.booleans(),
    direct=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_adjoint_is_unroll(**drawn):
    problem = Bilevel(**drawn)
    adjoint, unroll = by(problem, estimators.Adjoint()), by(problem, estimators.Unroll())
    assert (flat(adjoint) - flat(unroll)).norm() <= 1e-10 * flat(unroll).norm()
    torch.testing.assert_close(adjoint.outer_loss, unroll.outer_loss, rtol=1e-13, atol=0)
    for name in problem.params:
        torch.testing.assert_close(adjoint.params[name], unroll.params[name], rtol=1e-12, atol=1e-14)
    assert not any(t.requires_grad for t in tensors([adjoint.gradient, adjoint.params, adjoint.optimizer_state]))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_adjoint_is_double_backward_and_finite_differences(rule):
    problem = Bilevel(steps=4, rule=rule, unused=True)
    expected = torch.cat([g.flatten() for g in problem.double_backward().gradient.values()])
    found = flat(by(problem, estimators.Adjoint()))
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimators.Adjoint())


@given(rule=st.sampled_from(sorted(RULES)), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_from_a_warm_state(rule, seed):
    first = by(Bilevel(steps=2, rule=rule, seed=seed), estimators.Unroll())
    problem = Bilevel(steps=3, rule=rule, seed=seed + 1)
    warm = {"optimizer_state": first.optimizer_state}
    adjoint, unroll = by(problem, estimators.Adjoint(), **warm), by(problem, estimators.Unroll(), **warm)
    assert (flat(adjoint) - flat(unroll)).norm() <= 1e-10 * flat(unroll).norm()


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")
@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("name", ZOO)
def test_any_student_through_three_steps(name, rule):
    found = []
    for estimator in (estimators.Adjoint(), estimators.Unroll()):
        student, batch, meta_batch = meet(name)
        params = [p for p in student.parameters() if p.requires_grad]
        optimizer = {
            "momentum": torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2),
            "adam": torch.optim.Adam(params, lr=0.05),
        }[rule]
        torch.manual_seed(2)
        balancer = BilevelLossBalancer(
            student,
            {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
            optimizer=optimizer,
            inner="mirror",
            estimator=estimator,
        )
        torch.manual_seed(3)
        report = balancer.meta_step([batch, meta_batch, batch], meta_batch)
        gradient = torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()])
        found.append((gradient, report.meta_loss, report.weights))
    (adjoint, *others), (unroll, *expected) = found
    assert (adjoint - unroll).norm() <= 1e-10 * unroll.norm()
    torch.testing.assert_close(others, expected, rtol=1e-10, atol=1e-12)


def kept_bytes(estimator, steps):
    """The most that autograd held at once, in bytes."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.nbytes
            alive += self.size
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.size

    problem = Bilevel(steps=steps, batch_size=50, rule="momentum")
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        by(problem, estimator)
    return peak


def test_adjoint_holds_the_graph_of_one_step_at_a_time():
    assert kept_bytes(estimators.Adjoint(), 12) <= 1.02 * kept_bytes(estimators.Adjoint(), 3)
    assert kept_bytes(estimators.Unroll(), 12) >= 3 * kept_bytes(estimators.Unroll(), 3)
    assert kept_bytes(estimators.Adjoint(), 12) < kept_bytes(estimators.Unroll(), 12) / 4


def test_truncated_is_exact_at_k_and_closer_with_every_step_on_a_quadratic():
    """theta contracts by 1 - lr a each step, and so does what a truncation leaves out."""
    lr, a, steps = 0.2, torch.tensor([1.0, 2.0], dtype=torch.float64), 8

    def gradient(estimator):
        return hypergradient(
            lambda p, m, batch: (a * (p["x"] - m["c"]) ** 2).sum() / 2,
            lambda p, m: p["x"].sum(),
            {"x": torch.ones(2, dtype=torch.float64)},
            {"c": torch.zeros(2, dtype=torch.float64)},
            range(steps),
            optimizer=torchopt.sgd(lr=lr),
            estimator=estimator,
        ).gradient["c"]

    exact = gradient(estimators.Adjoint())
    torch.testing.assert_close(exact, 1 - (1 - lr * a) ** steps, rtol=1e-12, atol=0)
    for horizon in range(1, steps + 1):
        found = gradient(estimators.Truncated(horizon))
        torch.testing.assert_close(found, 1 - (1 - lr * a) ** horizon, rtol=1e-12, atol=0)
    assert torch.equal(gradient(estimators.Truncated(steps + 5)), exact)


@given(steps=st.integers(1, 4), rule=st.sampled_from(sorted(RULES)), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_truncated_at_k_is_adjoint(steps, rule, seed):
    problem = Bilevel(steps=steps, rule=rule, seed=seed)
    torch.testing.assert_close(flat(by(problem, estimators.Truncated(steps))), flat(by(problem, estimators.Adjoint())))


@pytest.mark.parametrize("horizon", [0, -1, 1.5, "all"])
def test_a_horizon_is_a_positive_number_of_steps(horizon):
    with pytest.raises(MetaKDError, match="whole number of at least 1"):
        estimators.Truncated(horizon)
