"""`check_hypergradient` passes what is right, fails what is wrong by a thousandth, and leaves no trace."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torchopt
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient
from metakd.batch import tensors
from metakd.estimators import OneStep, Unroll
from metakd.estimators.bilevel import build_problem
from metakd.terms import CrossEntropy, SoftTarget
from metakd.weighting import LossMLP, Rectified
from tests.estimators.problems import RULES, Bilevel, relative
from tests.slow import slow_but


@dataclass(frozen=True)
class Scaled:
    """An estimator whose gradient is wrong by a factor, in the meta-parameters that are named."""

    factor: float
    names: tuple[str, ...] = ("mix", "offset")

    def __call__(self, problem):
        right = Unroll()(problem)
        wrong = {name: g * (self.factor if name in self.names else 1) for name, g in right.gradient.items()}
        return right._replace(gradient=wrong)


@pytest.mark.parametrize("rule", slow_but(["momentum"], RULES))
@pytest.mark.parametrize(("steps", "estimator"), [(1, OneStep()), (1, OneStep("reverse")), (3, None)])
def test_what_is_right_passes(rule, steps, estimator):
    problem = Bilevel(rule=rule, steps=steps, unused=True, direct=steps == 3)
    found = check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator, directions=2)
    assert set(found.relative_error) == {"mix", "offset"}
    assert all(error < 1e-8 for error in found.relative_error.values())
    for name in found.relative_error:
        assert len(found.estimated[name]) == len(found.finite_differences[name]) == 2
        assert found.estimated[name] == pytest.approx(found.finite_differences[name], rel=1e-6)


def test_float32_is_cast():
    problem = Bilevel(rule="adam", steps=2, dtype=torch.float32)
    object.__setattr__(problem, "meta_batch", tuple(t.double() for t in problem.meta_batch))
    found = check_hypergradient(*problem.arguments(), optimizer=problem.torchopt())
    assert all(error < 1e-8 for error in found.relative_error.values())
    assert {t.dtype for t in tensors((problem.params, problem.meta_params, problem.batches))} == {torch.float32}


def test_from_a_warm_state():
    problem = Bilevel(rule="momentum", steps=2)
    optimizer = problem.torchopt()
    state = Unroll()(build_problem(*problem.arguments(), optimizer)).optimizer_state
    before = [t.clone() for t in tensors((problem.params, problem.meta_params, problem.batches, state))]
    warm = check_hypergradient(*problem.arguments(), optimizer=optimizer, optimizer_state=state)
    cold = check_hypergradient(*problem.arguments(), optimizer=optimizer)
    assert warm.estimated["mix"] != pytest.approx(cold.estimated["mix"], rel=1e-3)
    after = tensors((problem.params, problem.meta_params, problem.batches, state))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_wrong_by_a_thousandth_fails_with_the_numbers():
    problem = Bilevel(steps=2)
    with pytest.raises(MetaKDError) as error:
        check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=Scaled(1.001))
    message = str(error.value)
    right = check_hypergradient(*problem.arguments(), optimizer=problem.torchopt())
    assert "Scaled(factor=1.001" in message and "more than 1e-06" in message
    for name in ("mix", "offset"):
        assert f"{name}: relative error 1.0e-03" in message
        assert f"{right.finite_differences[name][0]:.6e}" in message
        assert f"{1.001 * right.estimated[name][0]:.6e}" in message


def test_only_the_wrong_ones_are_named():
    problem = Bilevel(steps=2)
    with pytest.raises(MetaKDError) as error:
        check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=Scaled(1.001, ("mix",)))
    assert "mix: relative" in str(error.value) and "offset: relative" not in str(error.value)


def test_an_approximation_passes_within_its_tolerance():
    problem = Bilevel(steps=2)
    found = check_hypergradient(
        *problem.arguments(), optimizer=problem.torchopt(), estimator=Scaled(1.001), tolerance=1e-2
    )
    assert found.relative_error == pytest.approx({"mix": 1e-3, "offset": 1e-3}, rel=1e-3)


@pytest.mark.parametrize("estimator", [OneStep("reverse"), Unroll()], ids=str)
def test_an_inner_loss_that_draws_random_numbers_of_its_own_fails(estimator):
    problem, own = Bilevel(), torch.Generator()
    inner, *others = problem.arguments()

    def noisy(params, meta_params, batch):
        return inner(params, meta_params, batch) * (1 + 0.01 * torch.rand((), generator=own).double())

    with pytest.raises(MetaKDError, match=r"relative error .*\n.*not a pure function: .*random numbers"):
        check_hypergradient(noisy, *others, optimizer=problem.torchopt(), estimator=estimator)


def test_an_inner_loss_that_remembers_fails():
    problem, calls = Bilevel(), []
    inner, *others = problem.arguments()

    def remembering(params, meta_params, batch):
        calls.append(batch)
        return inner(params, meta_params, batch) * (1 + 0.1 * len(calls))

    with pytest.raises(MetaKDError, match="not a pure function"):
        check_hypergradient(remembering, *others, optimizer=problem.torchopt())


def test_a_weight_that_is_felt_in_the_gradient_alone_fails():
    """Detached where it matters: what the steps do with it is not what autograd sees."""
    problem = Bilevel(steps=2)
    inner, *others = problem.arguments()

    def detaching(params, meta_params, batch):
        factor = sum(p.detach().pow(2).sum() for p in params.values())
        return inner(params, meta_params, batch) * factor

    with pytest.raises(MetaKDError, match="a stop-gradient"):
        check_hypergradient(detaching, *others, optimizer=problem.torchopt())


def test_an_outer_loss_that_is_nan_nearby_fails():
    with pytest.raises(MetaKDError, match=r"finite differences .*nan"):
        check_hypergradient(
            lambda p, m, batch: (m["phi"] * p["x"]).sum(),
            lambda p, m: p["x"].sum() + (0.0 if m["phi"].item() == 0.5 else float("nan")),
            {"x": torch.tensor([1.0])},
            {"phi": torch.tensor([0.5])},
            [None],
            optimizer=torchopt.sgd(lr=0.1),
        )


def test_a_meta_parameter_that_nothing_feels_is_no_error():
    problem = Bilevel()
    problem.meta_params["spare"] = torch.ones(2, dtype=torch.float64)
    found = check_hypergradient(*problem.arguments(), optimizer=problem.torchopt())
    assert found.relative_error["spare"] == 0.0


def test_tiny_derivatives_are_judged_by_what_float64_can_tell():
    """Adam's first step hardly depends on the size of the gradient: the derivative is 1e-8 of the loss."""
    found = check_hypergradient(
        lambda p, m, batch: (m["phi"] * p["w"] ** 2).sum(),
        lambda p, m: (p["w"] ** 3).sum(),
        {"w": torch.tensor([1.0, 2.0])},
        {"phi": torch.tensor([0.3, 0.2])},
        [None],
        optimizer=torchopt.adam(lr=0.1),
        directions=8,
    )
    assert math.hypot(*found.finite_differences["phi"]) < 1e-6


def test_other_directions_for_other_seeds():
    problem = Bilevel()
    one, same, other = (
        check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), seed=seed) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.estimated["mix"] != other.estimated["mix"]


def test_arguments_that_are_missing_are_an_error():
    inner, outer, params, meta_params, batches = Bilevel().arguments()
    with pytest.raises(MetaKDError, match=r"\(inner, outer, params, meta_params, batches, optimizer=\.\.\.\)"):
        check_hypergradient(inner, outer, params, meta_params, batches)
    with pytest.raises(MetaKDError, match=r"\(balancer, batches, meta_batch\)"):
        check_hypergradient(inner, outer, params)
    with pytest.raises(MetaKDError, match="batches is empty"):
        check_hypergradient(inner, outer, params, meta_params, [], optimizer=torchopt.sgd(lr=0.1))


class Student(nn.Sequential):
    """Batch statistics, dropout and a frozen layer."""

    def __init__(self):
        super().__init__(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 5), nn.Linear(5, 3)
        )
        self[4].requires_grad_(False)


def balancer_and_batches(steps, inner, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(3)
    student, teacher = Student(), nn.Linear(4, 3)
    options.setdefault("weighting", LossMLP(2, 2, hidden=(4,)))
    rates = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"eps": 1e-2}
    real = optimizer(student.parameters(), lr=0.1, weight_decay=1e-2, **rates)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(steps + 1)]
    for x, y in batches:  # so that the optimizer has a state, and parameters have gradients
        real.zero_grad()
        nn.functional.cross_entropy(student(x), y).backward()
        real.step()
    balancer = BilevelLossBalancer(
        student,
        {"hard": CrossEntropy(), "soft": SoftTarget(2.0)},
        optimizer=real,
        teacher=teacher,
        inner=inner,
        **options,
    )
    return balancer, batches[:-1], batches[-1]


def look(balancer):
    """Everything that a check could leave a trace on."""
    modules = (balancer.student, balancer.weighting, balancer.teacher)
    return copy.deepcopy(
        [
            [module.state_dict() for module in modules],
            [[p.grad for p in module.parameters()] for module in modules],
            [[m.training for m in module.modules()] for module in modules],
            [[p.dtype for p in module.parameters()] for module in modules],
            balancer.optimizer.state_dict(),
            balancer.state_dict(),
            torch.get_rng_state(),
        ]
    )


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("inner", slow_but(["mirror"], ["sgd", "mirror"]))
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("steps", "estimator"), [(1, OneStep()), (1, OneStep("reverse")), (3, Unroll())])
def test_a_balancer_in_float32_passes_and_stays_as_it_was(inner, optimizer, steps, estimator):
    balancer, batches, meta_batch = balancer_and_batches(steps, inner, optimizer, estimator=estimator)
    balancer(batches[0], meta_batch) if steps == 1 else balancer.meta_step(batches, meta_batch)
    before, report = look(balancer), balancer.report
    found = check_hypergradient(balancer, batches, meta_batch, directions=2)
    assert set(found.relative_error) == dict(balancer.weighting.named_parameters()).keys()
    assert all(error < 1e-6 for error in found.relative_error.values())
    assert any(abs(slope) > 0 for slopes in found.estimated.values() for slope in slopes)
    assert_same(look(balancer), before)
    assert balancer.report is report


@pytest.mark.slow
def test_a_balancers_own_estimator_is_checked_unless_another_is_given():
    balancer, batches, meta_batch = balancer_and_batches(3, "sgd")
    with pytest.raises(MetaKDError, match="exactly one inner step, got 3"):
        check_hypergradient(balancer, batches, meta_batch)
    check_hypergradient(balancer, batches, meta_batch, estimator=Unroll(), directions=1)
    names = tuple(dict(balancer.weighting.named_parameters()))
    before = look(balancer)
    with pytest.raises(MetaKDError, match=r"relative error 1\.0e-03"):
        check_hypergradient(balancer, batches, meta_batch, estimator=Scaled(1.001, names))
    assert_same(look(balancer), before)


def test_the_check_is_of_the_hypergradient_that_a_call_takes():
    """The same numbers, in float32, are in the weight model's gradients after the call."""
    balancer, batches, meta_batch = balancer_and_batches(1, "mirror")
    rng = torch.get_rng_state()
    with balancer.problem(batches, meta_batch, torch.float64) as problem:
        expected = OneStep()(problem).gradient
    torch.set_rng_state(rng)
    balancer(batches[0], meta_batch)
    found = {name: p.grad for name, p in balancer.weighting.named_parameters()}
    assert relative(found, expected) < 1e-4


def test_a_weight_model_without_parameters_cannot_be_checked():
    balancer, batches, meta_batch = balancer_and_batches(1, "sgd", weighting=Rectified())
    with pytest.raises(MetaKDError, match="Rectified has no trainable parameters"):
        check_hypergradient(balancer, batches, meta_batch)
