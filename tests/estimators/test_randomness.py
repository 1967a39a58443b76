"""Random numbers in the losses: each step has its own, the same ones whenever it is evaluated again."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchopt

from metakd import MetaKDError, check_hypergradient, hypergradient
from metakd._basics.rng import RngState
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll
from tests.estimators.problems import relative

DOUBLE = torch.float64
X, Y = (torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) for seed in (0, 1))


def dropped(p, m, batch):
    """Dropout, and noise of Python's and NumPy's."""
    noise = random.random() + numpy.random.rand()
    residual = F.dropout(torch.tanh(X * m["g"] @ p["w"]), 0.5) - Y * noise
    return residual.square().mean() + 0.1 * p["w"].square().sum()


def outer(p, m, batch):
    return F.mse_loss(F.dropout(X @ p["w"], 0.5), Y) * (1 + random.random())


def call(estimator, steps=3, seed=0, **options):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    return hypergradient(
        dropped,
        outer,
        {"w": torch.eye(4, dtype=DOUBLE)},
        {"g": torch.linspace(0.5, 1.5, 4, dtype=DOUBLE)},
        range(steps),
        optimizer=torchopt.sgd(lr=0.3, momentum=0.5),
        outer_batches=range(2),
        estimator=estimator,
        **options,
    )


def drawn():
    return torch.rand(3), random.random(), numpy.random.rand()


def after_each_loss_once(steps):
    """The generators as a plain training leaves them: each step, then each outer batch."""
    call(Unroll(), steps)  # seeds
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    p, m = {"w": torch.eye(4, dtype=DOUBLE)}, {"g": torch.ones(4, dtype=DOUBLE)}
    for t in range(steps):
        dropped(p, m, t)
    for i in range(2):
        outer(p, m, i)
    return RngState.capture([])


def same(a, b):
    return torch.equal(a.cpu, b.cpu) and a.python == b.python and numpy.array_equal(a.numpy[1], b.numpy[1])


EXACT = [Adjoint(), Adjoint("forward"), Adjoint("auto"), Truncated(3)]
OTHERS = [IdentityJacobian(), Truncated(2), FiniteDifference(), Implicit(damping=20.0)]


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_exact_estimators_are_unroll_from_the_same_seed(estimator):
    found, expected = call(estimator), call(Unroll())
    assert relative(found.gradient, expected.gradient) < 1e-10
    assert relative(found.params_gradient, expected.params_gradient) < 1e-10
    assert relative(found.params, expected.params) < 1e-14
    torch.testing.assert_close(found.outer_loss, expected.outer_loss, rtol=1e-14, atol=0)
    assert relative(found.gradient, call(estimator, seed=1).gradient) > 0.01  # the seed matters


@pytest.mark.parametrize(
    "estimator", [OneStep(), OneStep("forward"), OneStep("reverse"), Adjoint(), IdentityJacobian()]
)
def test_one_step_too(estimator):
    assert relative(call(estimator, 1).gradient, call(Unroll(), 1).gradient) < 1e-10


@pytest.mark.parametrize("verify", [None, True])
@pytest.mark.parametrize("estimator", [*EXACT, *OTHERS, Unroll()], ids=str)
def test_afterwards_the_generators_are_as_after_each_loss_once(estimator, verify):
    call(estimator, verify=verify)
    assert same(RngState.capture([]), after_each_loss_once(3))


def test_it_is_the_slope_of_the_training_with_these_random_numbers():
    def inner(p, m, batch):
        return F.mse_loss(F.dropout(torch.tanh(X * m["g"] @ p["w"]), 0.5), Y)

    params, meta = {"w": torch.eye(4, dtype=DOUBLE)}, {"g": torch.ones(4, dtype=DOUBLE)}
    found = check_hypergradient(
        inner, lambda p, m: F.mse_loss(X @ p["w"], Y), params, meta, range(3), optimizer=torchopt.sgd(lr=0.3)
    )
    assert found.relative_error["g"] < 1e-6


def test_a_batch_given_twice_draws_twice():
    masks = []

    def inner(p, m, batch):
        masks.append(torch.rand(2))
        return (m["phi"] * p["x"] ** 2 * masks[-1]).sum()

    batch = object()
    hypergradient(
        inner,
        lambda p, m: p["x"].sum(),
        {"x": torch.ones(2)},
        {"phi": torch.ones(2)},
        [batch, batch],
        optimizer=torchopt.sgd(lr=0.1),
    )
    first, second, second_again, first_again = masks
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again) and torch.equal(second, second_again)


def test_after_an_error_the_generators_are_where_they_were():
    def inner(p, m, batch):
        if torch.rand(()) >= 0 and batch == 1:
            raise ValueError("inside")
        return (m["phi"] * p["x"]).sum()

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"):
        hypergradient(
            inner,
            lambda p, m: p["x"].sum(),
            {"x": torch.ones(2)},
            {"phi": torch.ones(2)},
            range(2),
            optimizer=torchopt.sgd(lr=0.1),
        )
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_of_its_own_is_found_by_verify():
    generator = torch.Generator().manual_seed(0)

    def inner(p, m, batch):
        return (m["phi"] * p["x"] ** 2 * torch.rand(2, generator=generator)).sum()

    with pytest.raises(MetaKDError, match=r"the inner loss is not a pure function: .* gave .* a generator of its own"):
        hypergradient(
            inner,
            lambda p, m: p["x"].sum(),
            {"x": torch.ones(2)},
            {"phi": torch.ones(2)},
            range(2),
            optimizer=torchopt.sgd(lr=0.1),
            verify=True,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    def found(estimator):
        torch.manual_seed(0)
        return hypergradient(
            lambda p, m, t: F.dropout(m["g"] * p["w"] ** 3, 0.5).sum(),
            lambda p, m: p["w"].sum(),
            {"w": torch.rand(50, device="cuda") + 0.5},
            {"g": torch.ones(50, device="cuda")},
            range(3),
            optimizer=torchopt.sgd(lr=0.05),
            estimator=estimator,
        ), torch.rand(2, device="cuda")

    (adjoint, after), (unroll, after_unroll) = found(Adjoint()), found(Unroll())
    torch.testing.assert_close(adjoint.gradient, unroll.gradient)
    assert torch.equal(after, after_unroll)
