"""`hypergradient(verify=...)`: what is compared, what is found, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
import torchopt

from metakd import MetaKDError, hypergradient
from metakd.estimators import (
    Adjoint,
    FiniteDifference,
    IdentityJacobian,
    Implicit,
    Memory,
    OneStep,
    Truncated,
    Unroll,
)
from metakd.estimators.estimate import is_exact
from tests.estimators.problems import RULES, Bilevel, Cube, relative
from tests.slow import slow_but

X, Y = (torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def normalised(estimator, steps=1, dtype=torch.float64, **options):
    """Meta-parameters upstream of layer_norm, whose tangents are constants to reverse mode."""
    x, y = X.to(dtype), Y.to(dtype)
    return hypergradient(
        lambda p, m, b: F.mse_loss(F.layer_norm(x * m["g"] @ p["w"], (4,)), y),
        lambda p, m: F.mse_loss(x @ p["w"], y),
        {"w": torch.eye(4, dtype=dtype)},
        {"g": torch.ones(4, dtype=dtype)},
        range(steps),
        optimizer=torchopt.sgd(lr=0.1),
        estimator=estimator,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_mode_by_name_is_compared(dtype):
    with pytest.raises(MetaKDError, match=r"OneStep\(mode='forward'\) differs from reverse mode by .* in 'g': \[.*\]"):
        normalised(OneStep("forward"), dtype=dtype)
    wrong = normalised(OneStep("forward"), dtype=dtype, verify=False)
    assert relative(wrong.gradient, normalised(OneStep(), dtype=dtype).gradient) > 0.5


@pytest.mark.parametrize("rule", slow_but(("momentum", "clip, adam"), RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("verify", [None, True])
def test_what_is_right_passes(rule, dtype, verify):
    for estimator in (OneStep("forward"), OneStep(), OneStep("reverse", parameters=["w2", "w10.*"]), Unroll()):
        problem = Bilevel(rule=rule, dtype=dtype)
        hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator, verify=verify)
    for estimator in (Adjoint("forward"), Adjoint(), Truncated(1), Truncated(3), IdentityJacobian(), Unroll()):
        problem = Bilevel(rule=rule, dtype=dtype, steps=3, unused=True)
        hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator, verify=verify)


class Wrong(Cube):
    """x^3 whose second derivative is doubled in forward mode."""

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 6 * x**2 * tangent


def cubic(estimator, function=Wrong.apply, steps=1, **options):
    arguments = {
        "inner": lambda p, m, batch: (m["phi"] * function(p["x"])).sum(),
        "outer": lambda p, m: (p["x"] ** 2).sum() / 2,
        "params": {"x": torch.tensor([1.0, 2.0])},
        "meta_params": {"phi": torch.tensor([0.3, 0.2])},
        "batches": range(steps),
        "optimizer": torchopt.sgd(lr=0.01),
        **options,
    }
    return hypergradient(**arguments, estimator=estimator)


@pytest.mark.parametrize(("estimator", "steps"), [(OneStep("forward"), 1), (Adjoint("forward"), 3)], ids=str)
def test_a_wrong_forward_formula_is_refused_by_name(estimator, steps):
    with pytest.raises(MetaKDError, match=r"\(mode='forward'\) differs from reverse mode"):
        cubic(estimator, steps=steps)
    assert relative(cubic(estimator, steps=steps, verify=False).gradient, cubic(Unroll(), steps=steps).gradient) > 0.01


def counting():
    calls = []

    def loss(x):
        calls.append(0)
        return x * len(calls)

    return loss


def in_place(x):
    BATCH.mul_(1.5)
    return x * BATCH


BATCH = torch.ones(2)


@pytest.mark.parametrize("function", [counting(), in_place])
def test_an_impure_inner_loss_is_refused_by_verify(function):
    with pytest.raises(MetaKDError, match="the inner loss is not a pure function"):
        cubic(Adjoint(), function, 2, verify=True)


def test_an_impure_outer_loss_is_refused_by_verify():
    function = counting()
    with pytest.raises(MetaKDError, match="the outer loss of batch 1 is not a pure function"):
        cubic(
            Adjoint(),
            torch.sin,
            outer=lambda p, m, i: function(p["x"]).sum() if i else p["x"].sum(),
            outer_batches=[0, 1],
            verify=True,
        )


@pytest.mark.parametrize("verify", [None, False])
def test_without_it_each_loss_is_evaluated_as_often_as_needed(verify):
    calls = []

    def inner(p, m, batch):
        calls.append(batch)
        return (m["phi"] * p["x"] ** 2).sum()

    cubic(Adjoint(), inner=inner, steps=3, verify=verify)
    assert calls == [0, 1, 2, 2, 1, 0]


def half(problem):
    """An estimator of the user's own that is off."""
    found = Unroll()(problem)
    return found._replace(gradient={name: g / 2 for name, g in found.gradient.items()})


class Half:
    def __call__(self, problem):
        return half(problem)

    def exact(self, steps):
        return False


def test_an_exact_estimator_is_compared_with_unroll():
    with pytest.raises(MetaKDError, match=r"the hypergradient by <function half.* differs from that by Unroll\(\) by"):
        cubic(half, torch.sin, 2, verify=True)
    cubic(half, torch.sin, 2)
    cubic(Half(), torch.sin, 2, verify=True)


@pytest.mark.parametrize(
    ("estimator", "exact_up_to"),
    [
        (OneStep(), 9),
        (Adjoint(), 9),
        (Unroll(), 9),
        (Truncated(4), 4),
        (IdentityJacobian(), 1),
        (FiniteDifference(), 0),
        (Implicit(), 0),
        (half, 9),
    ],
)
def test_estimators_say_for_how_many_steps_they_are_exact(estimator, exact_up_to):
    assert [is_exact(estimator, steps) for steps in range(1, 10)] == [steps <= exact_up_to for steps in range(1, 10)]


@pytest.mark.parametrize(("verify", "compare"), [(None, True), (True, True), (False, False)])
def test_the_memory_says_whether_to_compare(verify, compare):
    seen = []

    def estimator(problem):
        seen.append(problem.memory)
        return Unroll()(problem)

    cubic(estimator, torch.sin, verify=verify)
    assert seen[0] == Memory(compare=compare)
