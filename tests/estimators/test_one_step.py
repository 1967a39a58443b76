"""`OneStep` against plain double backward and central differences, and how it chooses between its modes."""

import dataclasses
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import given, settings
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakd import MetaKDError, hypergradient
from metakd.estimators import OneStep, Unroll
from metakd.estimators.bilevel import build_problem
from tests.estimators.problems import RULES, Bilevel, Cube, assert_slope, problems, relative
from tests.zoo import NoForwardMode

EXACT = [OneStep("forward"), OneStep("reverse"), Unroll()]


@settings(deadline=None, max_examples=60)
@given(problems())
def test_exact_ones_are_plain_double_backward_and_central_differences(problem):
    expected = problem.double_backward()
    assert_slope(expected.gradient, problem)
    for estimator in EXACT:
        found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
        assert relative(found.gradient, expected.gradient) < 1e-10, estimator
        assert relative(found.params, expected.params) < 1e-12, estimator
        torch.testing.assert_close(found.outer_loss, expected.outer_loss, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=30)
@given(problems(), st.integers(0, 2**31 - 1))
def test_from_the_state_that_earlier_steps_left(problem, seed):
    earlier = Bilevel(
        steps=2,
        rule=problem.rule,
        frozen=problem.frozen,
        unused=problem.unused,
        losses=problem.losses,
        seed=seed,
    )
    before = hypergradient(*earlier.arguments(), optimizer=earlier.torchopt())
    expected_before = earlier.double_backward()
    problem.params.update(expected_before.params)
    expected = problem.double_backward(expected_before.state, first_step=2)
    for estimator in EXACT:
        found = hypergradient(
            *problem.arguments(),
            optimizer=problem.torchopt(),
            optimizer_state=before.optimizer_state,
            estimator=estimator,
        )
        assert relative(found.gradient, expected.gradient) < 1e-9, estimator


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("estimator", [OneStep(), *EXACT], ids=str)
def test_float32(rule, estimator):
    expected = Bilevel(rule=rule, unused=True).double_backward()
    problem = Bilevel(rule=rule, unused=True, dtype=torch.float32)
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    assert {g.dtype for g in found.gradient.values()} == {torch.float32}
    assert relative(found.gradient, expected.gradient) < 1e-4


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("steps", [0, 2])
def test_any_other_number_of_steps_is_an_error(mode, steps):
    problem = Bilevel(steps=2)
    arguments = (problem.inner, problem.outer, problem.params, problem.meta_params, problem.batches[:steps])
    with pytest.raises(MetaKDError, match=r"exactly one inner step, got 2 batches|batches is empty"):
        hypergradient(*arguments, optimizer=problem.torchopt(), estimator=OneStep(mode))


def test_unknown_modes_are_an_error():
    with pytest.raises(MetaKDError, match=r"'auto', 'forward' and 'reverse', not 'backward'"):
        OneStep("backward")


def spied(problem, monkeypatch, mode):
    """Which calls of the inner loss saw parameters with a graph, and which backward passes kept one."""
    calls, created = [], []
    grad = torch.autograd.grad

    def spying_grad(*args, **options):
        created.append(bool(options.get("create_graph")))
        return grad(*args, **options)

    def inner(params, meta_params, batch):
        calls.append({name for name, p in params.items() if p.requires_grad})
        return problem.inner(params, meta_params, batch)

    monkeypatch.setattr(torch.autograd, "grad", spying_grad)
    _, *others = problem.arguments()
    hypergradient(inner, *others, optimizer=problem.torchopt(), estimator=OneStep(mode), verify=False)
    return calls, created


@pytest.mark.parametrize("rule", ["sgd", "clip, adam"])
def test_forward_mode_builds_no_second_order_graph(rule, monkeypatch):
    problem = Bilevel(rule=rule, losses=5, steps=1)
    calls, created = spied(problem, monkeypatch, "forward")
    assert calls == [
        set(problem.params),
        set(),
    ]  # the gradient; then one pass of dual numbers serves all losses
    assert created and not any(created)


def test_reverse_mode_does(monkeypatch):
    problem = Bilevel()
    calls, created = spied(problem, monkeypatch, "reverse")
    assert calls == [set(problem.params)] * 2
    assert sum(created) == 1


def test_a_first_gradient_at_hand_is_not_computed_again():
    problem, calls = Bilevel(rule="momentum"), []

    def inner(params, meta_params, batch):
        calls.append(batch)
        return problem.inner(params, meta_params, batch)

    given_problem = build_problem(*problem.arguments(), problem.torchopt())
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    problem.inner(leaves, problem.meta_params, problem.batches[0]).backward()
    at_hand = {name: p.grad for name, p in leaves.items()}
    given_problem = dataclasses.replace(
        given_problem,
        inner=lambda p, m, step: inner(p, m, step.batch),
        first_gradient=lambda names: at_hand,
    )
    found = OneStep("forward")(given_problem)
    assert len(calls) == 1
    assert relative(found.gradient, problem.double_backward().gradient) < 1e-10


class ForwardOnly(Cube):
    """x -> x^3, differentiable once in reverse mode, and in forward mode."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Cube.backward(ctx, g)


def cubic(function):
    """Arguments of `hypergradient`: theta' = x - 0.1 * 3 phi x^2, outer theta'^2 / 2."""
    return (
        lambda p, m, batch: (m["phi"] * function(p["x"])).sum(),
        lambda p, m: (p["x"] ** 2).sum() / 2,
        {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"phi": torch.tensor([0.3, 0.2], dtype=torch.float64)},
        [None],
    )


def cubic_gradient():
    x, phi = cubic(None)[2]["x"], cubic(None)[3]["phi"]
    return (x - 0.3 * phi * x**2) * -0.3 * x**2


def attention(x):
    q = x.reshape(1, 1, 2, 1) * torch.linspace(0.1, 1, 8, dtype=x.dtype)
    return F.scaled_dot_product_attention(q, q.cos(), q.sin()).sum()


def run(arguments, mode, **options):
    options.setdefault("verify", False if mode == "forward" else None)
    return hypergradient(*arguments, optimizer=torchopt.sgd(lr=0.1), estimator=OneStep(mode), **options).gradient["phi"]


def test_auto_is_reverse_mode_and_silent():
    torch.testing.assert_close(run(cubic(NoForwardMode.apply), "auto"), cubic_gradient(), rtol=1e-12, atol=0)
    assert torch.equal(run(cubic(torch.sin), "auto"), run(cubic(torch.sin), "reverse"))


def test_reverse_is_silent_and_forward_fails_where_forward_mode_is_missing():
    with warnings.catch_warnings(record=True) as caught:
        found = run(cubic(NoForwardMode.apply), "reverse")
    assert not caught
    torch.testing.assert_close(found, cubic_gradient(), rtol=1e-12, atol=0)
    with pytest.raises(MetaKDError, match=r"no forward-mode derivative .*jvp.*'auto' or 'reverse'") as error:
        run(cubic(NoForwardMode.apply), "forward")
    assert isinstance(error.value.__cause__, NotImplementedError)


def test_forward_mode_needs_no_double_backward_but_for_the_comparison():
    found = run(cubic(ForwardOnly.apply), "forward")
    torch.testing.assert_close(found, cubic_gradient(), rtol=1e-12, atol=0)
    with pytest.raises(MetaKDError, match=r"cannot be compared .*ForwardOnly.*verify=False"):
        run(cubic(ForwardOnly.apply), "forward", verify=None)


@pytest.mark.parametrize("estimator", [OneStep("reverse"), Unroll()], ids=str)
def test_reverse_mode_without_a_double_backward_is_an_error(estimator):
    with pytest.raises(MetaKDError, match="marked @once_differentiable"):
        hypergradient(*cubic(ForwardOnly.apply), optimizer=torchopt.sgd(lr=0.1), estimator=estimator)


@pytest.mark.parametrize("estimator", [OneStep("forward"), OneStep("reverse"), Unroll()], ids=str)
def test_fused_attention_fails_by_name_and_the_math_kernel_works(estimator):
    def taken():
        return hypergradient(*cubic(attention), optimizer=torchopt.sgd(lr=0.1), estimator=estimator)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(MetaKDError, match="flash_attention"):
        taken()
    with sdpa_kernel(SDPBackend.MATH):
        found = taken().gradient
        reference = hypergradient(*cubic(attention), optimizer=torchopt.sgd(lr=0.1)).gradient
    assert relative(found, reference) < 1e-10


def test_errors_of_the_inner_loss_are_its_own():
    def inner(params, meta_params, batch):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        run((inner, *cubic(None)[1:]), "auto")


def stopped_by_context(x):
    with torch.no_grad():
        factor = x**2
    return factor * x


@torch.no_grad()
def squared(x):
    return x**2


def stopped_by_switch(x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    factor = x**2
    torch.set_grad_enabled(before)
    return factor * x


def stopped_by_inference(x):
    with torch.inference_mode():
        factor = x**2
    return factor.clone() * x


@pytest.mark.parametrize(
    "function",
    [
        stopped_by_context,
        stopped_by_switch,
        stopped_by_inference,
        lambda x: squared(x) * x,
        lambda x: x.detach() ** 2 * x,
        lambda x: x.data**2 * x,
    ],
)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_what_is_constant_to_the_training_step_is_constant_here(function, mode):
    """By themselves dual numbers pass through `torch.no_grad()`, which the gradient of the step does not."""
    x, phi = cubic(None)[2]["x"], cubic(None)[3]["phi"]
    torch.testing.assert_close(run(cubic(function), mode), (x - 0.1 * phi * x**2) * -0.1 * x**2, rtol=1e-12, atol=0)


def test_an_error_where_gradients_are_switched_off_leaves_forward_mode_on():
    def inner(params, meta_params, batch):
        torch.set_grad_enabled(False)
        raise KeyError("inside")

    problem = build_problem(inner, *cubic(None)[1:], torchopt.sgd(lr=0.1))
    problem = dataclasses.replace(problem, first_gradient=lambda names: {"x": torch.ones(2, dtype=torch.float64)})
    with torch.enable_grad(), pytest.raises(KeyError):
        OneStep("forward")(problem)
    torch.testing.assert_close(run(cubic(lambda x: x**3), "forward"), cubic_gradient(), rtol=1e-12, atol=0)
