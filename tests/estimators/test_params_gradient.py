"""The gradient in theta_0: exact wherever it is given, None elsewhere."""

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st

from metakd import MetaKDError, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll
from metakd.inner import GradientTransformation, own
from tests.estimators.problems import RULES, Bilevel, central_differences, flat, problems, relative, some_direction

ONE = [Adjoint(), Adjoint("forward"), Unroll(), Truncated(1), OneStep(), OneStep("reverse")]
SEVERAL = [Adjoint(), Adjoint("forward"), Adjoint("auto"), Unroll(), Truncated(3), Truncated(7)]


def by(problem, estimator, **changes):
    options = {"optimizer": problem.torchopt(), "estimator": estimator, **changes}
    return hypergradient(*problem.arguments(), **options)


def by_differences(problem, direction):
    """The slope of the outer loss after K steps of torch.optim in theta_0."""

    def outer(params):
        moved = Bilevel(**{name: getattr(problem, name) for name in ("batch_size", "losses", "steps", "rule", "seed")})
        moved.params.update(params)
        return moved.after_torch_steps(problem.meta_params)

    return central_differences(outer, problem.params, direction, 1e-4)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_central_differences_through_torch_optim(rule, steps):
    problem = Bilevel(steps=steps, rule=rule)
    direction = some_direction(problem.params)
    slope = by_differences(problem, direction)
    for estimator in ONE if steps == 1 else SEVERAL:
        found = by(problem, estimator).params_gradient
        assert list(found) == list(problem.params)
        assert (flat(found) @ flat(direction)).item() == pytest.approx(slope, rel=1e-6), estimator


@given(problems(steps=1) | problems(steps=3))
@settings(deadline=None, max_examples=40)
def test_every_exact_one_is_unroll(problem):
    expected = by(problem, Unroll()).params_gradient
    for estimator in ONE if problem.steps == 1 else SEVERAL:
        assert relative(by(problem, estimator).params_gradient, expected) < 1e-9, estimator


@given(st.sampled_from(sorted(RULES)), st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_from_a_warm_state(rule, seed):
    before = by(Bilevel(steps=2, rule=rule, seed=seed), Unroll())
    problem, warm = Bilevel(steps=3, rule=rule, seed=seed + 1), {"optimizer_state": before.optimizer_state}
    expected = by(problem, Unroll(), **warm).params_gradient
    assert relative(by(problem, Adjoint(), **warm).params_gradient, expected) < 1e-9


@pytest.mark.parametrize(
    "estimator",
    [Truncated(2), IdentityJacobian(), FiniteDifference(), Implicit(damping=5.0)],
    ids=str,
)
def test_what_is_not_exact_in_the_start_does_not_give_it(estimator):
    assert by(Bilevel(steps=3), estimator).params_gradient is None


@pytest.mark.parametrize("estimator", [OneStep("forward"), OneStep(parameters=["w2"]), OneStep("reverse", ["w2"])])
def test_one_step_gives_it_in_reverse_mode_through_all_parameters(estimator):
    assert by(Bilevel(), estimator).params_gradient is None


def test_it_is_nested_like_the_parameters_and_zero_where_nothing_is_felt():
    found = hypergradient(
        lambda p, m, batch: (m["phi"] * p["layer"]["w"] ** 2).sum(),
        lambda p, m: p["layer"]["w"].sum(),
        {"layer": {"w": torch.tensor([1.0, 2.0])}, "other": torch.ones(3)},
        {"phi": torch.tensor(2.0)},
        range(2),
        optimizer=torchopt.sgd(lr=0.1),
    ).params_gradient
    torch.testing.assert_close(found, {"layer": {"w": torch.full((2,), 0.36)}, "other": torch.zeros(3)})


@pytest.mark.parametrize("estimator", [Adjoint(), Unroll(), OneStep(), Truncated(1)], ids=str)
def test_an_outer_loss_that_ignores_the_parameters_has_the_gradient_zero(estimator):
    found = hypergradient(
        lambda p, m, batch: (m["phi"] * p["w"] ** 2).sum(),
        lambda p, m: m["phi"] ** 2,
        {"w": torch.ones(2)},
        {"phi": torch.tensor(2.0)},
        [None],
        optimizer=torchopt.sgd(lr=0.1),
        estimator=estimator,
    )
    assert torch.equal(found.params_gradient["w"], torch.zeros(2))


def maml(estimator, **options):
    return hypergradient(
        lambda p, m, batch: (p["w"] - batch).pow(2).sum() / 2,
        lambda p, m: (p["w"] - 3).pow(2).sum() / 2,
        {"w": torch.tensor(1.0)},
        {},
        [0.0, 1.0],
        optimizer=torchopt.sgd(lr=0.5),
        estimator=estimator,
        **options,
    )


@pytest.mark.parametrize("verify", [None, True])
@pytest.mark.parametrize("estimator", [Adjoint(), Unroll(), Truncated(2)], ids=str)
def test_there_need_be_no_meta_parameters(estimator, verify):
    found = maml(estimator, verify=verify)  # theta_2 = theta_0 / 4 + 1 / 2
    assert found.gradient == {}
    torch.testing.assert_close(found.params_gradient["w"], torch.tensor((0.75 - 3) / 4))


@pytest.mark.parametrize("estimator", [Truncated(1), IdentityJacobian(), FiniteDifference()], ids=str)
def test_with_neither_there_is_nothing_to_differentiate_in(estimator):
    with pytest.raises(MetaKDError, match=r"meta_params is empty.*Adjoint"):
        maml(estimator)


@pytest.mark.parametrize("estimator", [Adjoint(), Unroll()], ids=str)
def test_an_update_without_derivatives_moves_the_end_with_the_start(estimator):
    def update(gradients, state, *, params=None, inplace=True):
        return {name: -0.1 * g.detach().sign() for name, g in gradients.items()}, state

    signs = own(GradientTransformation(lambda params: (), update))
    square = lambda p, *_: (p["x"] ** 2).sum()  # noqa: E731
    found = hypergradient(square, square, {"x": torch.tensor([3.0])}, {}, [None], optimizer=signs, estimator=estimator)
    torch.testing.assert_close(found.params_gradient["x"], torch.tensor([5.8]))
