"""`Adjoint` is `Unroll` without its memory; `Truncated` tends to it."""

import gc
import warnings

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.function import once_differentiable

from metakd import BilevelLossBalancer, MetaKDError, estimators, hypergradient, terms, weighting
from metakd.batch import tensors
from tests.estimators.problems import RULES, Bilevel, most_kept
from tests.zoo import meet


def by(problem, estimator, **options):
    return hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator, **options)


def flat(result):
    return torch.cat([g.flatten() for g in result.gradient.values()])


MODES = ["reverse", "forward", "auto"]


@given(
    mode=st.sampled_from(MODES),
    batch_size=st.integers(1, 4),
    losses=st.integers(1, 5),
    steps=st.integers(1, 5),
    rule=st.sampled_from(sorted(RULES)),
    frozen=st.booleans(),
    unused=st.booleans(),
    direct=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80)
def test_adjoint_is_unroll(mode, **drawn):
    problem = Bilevel(**drawn)
    adjoint, unroll = by(problem, estimators.Adjoint(mode)), by(problem, estimators.Unroll())
    assert (flat(adjoint) - flat(unroll)).norm() <= 1e-10 * flat(unroll).norm()
    torch.testing.assert_close(adjoint.outer_loss, unroll.outer_loss, rtol=1e-13, atol=0)
    for name in problem.params:
        torch.testing.assert_close(adjoint.params[name], unroll.params[name], rtol=1e-12, atol=1e-14)
    assert not any(t.requires_grad for t in tensors([adjoint.gradient, adjoint.params, adjoint.optimizer_state]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_adjoint_is_double_backward(rule, mode):
    problem = Bilevel(steps=4, rule=rule, unused=True)
    expected = torch.cat([g.flatten() for g in problem.double_backward().gradient.values()])
    found = flat(by(problem, estimators.Adjoint(mode)))
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@given(rule=st.sampled_from(sorted(RULES)), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_from_a_warm_state(rule, seed):
    first = by(Bilevel(steps=2, rule=rule, seed=seed), estimators.Unroll())
    problem = Bilevel(steps=3, rule=rule, seed=seed + 1)
    warm = {"optimizer_state": first.optimizer_state}
    adjoint, unroll = by(problem, estimators.Adjoint(), **warm), by(problem, estimators.Unroll(), **warm)
    assert (flat(adjoint) - flat(unroll)).norm() <= 1e-10 * flat(unroll).norm()


def kept_bytes(estimator, steps):
    problem = Bilevel(steps=steps, batch_size=50, rule="momentum")
    return most_kept(lambda: by(problem, estimator))


def test_adjoint_holds_the_graph_of_one_step_at_a_time():
    assert kept_bytes(estimators.Adjoint(), 12) <= 1.02 * kept_bytes(estimators.Adjoint(), 3)
    assert kept_bytes(estimators.Unroll(), 12) >= 3 * kept_bytes(estimators.Unroll(), 3)
    assert kept_bytes(estimators.Adjoint(), 12) < kept_bytes(estimators.Unroll(), 12) / 4


@pytest.mark.parametrize("name", ["group_norm", "custom_function"])
def test_auto_is_reverse_mode(name):
    """SiLU's and group norm's backward have no forward-mode derivative, the custom function none at all."""
    found = []
    for mode in ("auto", "reverse"):
        student, batch, meta_batch = meet(name)
        balancer = BilevelLossBalancer(
            student,
            [terms.CrossEntropy()],
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            weighting=weighting.ClassTable(3, 1).double(),
            estimator=estimators.Adjoint(mode),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no forward-mode derivative")  # of the first step's pass
            balancer.meta_step([batch] * 4, meta_batch)
        found.append(torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()]))
    assert torch.equal(*found)


def test_forward_mode_says_what_it_cannot_do():
    student, batch, meta_batch = meet("group_norm")
    balancer = BilevelLossBalancer(
        student,
        [terms.CrossEntropy()],
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        weighting=weighting.ClassTable(3, 1).double(),
        estimator=estimators.Adjoint("forward"),
    )
    with pytest.raises(MetaKDError, match=r"silu_backward.*Adjoint\(mode='reverse'\)"):
        balancer.meta_step([batch] * 3, meta_batch)


@pytest.mark.parametrize("mode", ["backward", None])
def test_another_mode_is_refused(mode):
    with pytest.raises(MetaKDError, match="modes 'reverse', 'forward' and 'auto'"):
        estimators.Adjoint(mode)


def test_offload_keeps_the_sweep_elsewhere():
    problem = Bilevel(steps=4, rule="adam")
    here, there = by(problem, estimators.Adjoint()), by(problem, estimators.Adjoint(offload="cpu"))
    assert torch.equal(flat(here), flat(there))
    with pytest.raises(NotImplementedError, match="meta tensor"):  # it went there, and nothing comes back from there
        by(problem, estimators.Adjoint(offload="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_frees_the_gpu():
    peaks = []
    for offload in (None, "cpu"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = torch.ones(2**20, device="cuda")
        hypergradient(
            lambda p, m, batch: (m["phi"] * p["x"] ** 2).sum(),
            lambda p, m: p["x"].sum(),
            {"x": x},
            {"phi": torch.ones((), device="cuda")},
            range(30),
            optimizer=torchopt.sgd(lr=0.1),
            estimator=estimators.Adjoint(offload=offload),
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del x
    assert peaks[1] < peaks[0] / 2


class ConstantlyPulled(torch.autograd.Function):
    """x^2, once differentiable; where its incoming gradient is constant autograd has nothing to complain about."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


@pytest.mark.parametrize("estimator", [*map(estimators.Adjoint, MODES), estimators.Unroll()], ids=str)
def test_a_lost_curvature_is_not_lost_silently(estimator):
    with pytest.raises(MetaKDError, match=r"ConstantlyPulled\.backward is marked @once_differentiable"):
        hypergradient(
            lambda p, m, batch: ConstantlyPulled.apply(p["x"]).sum() + (m["phi"] * p["x"]).sum(),
            lambda p, m: p["x"].sum(),
            {"x": torch.ones(2)},
            {"phi": torch.ones(2)},
            range(3),
            optimizer=torchopt.sgd(lr=0.1),
            estimator=estimator,
        )


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
    with pytest.raises(MetaKDError, match="integer of at least 1"):
        estimators.Truncated(horizon)
