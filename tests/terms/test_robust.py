"""Robust terms against their formulas, written out in float64, and what is known of their gradients."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from metakd import Batch, MetaKDError
from metakd.terms import (
    Bootstrapped,
    CrossEntropy,
    ForwardCorrected,
    GeneralisedCrossEntropy,
    estimated_transition,
)
from tests.terms.problems import problem, transition

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31 - 1))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def of_labels(values, targets):
    return values[torch.arange(len(values)), targets]


@given(SIZES, st.floats(0.05, 1.0))
def test_generalised_cross_entropy(sizes, q):
    z, batch, _ = problem(*sizes)
    close(GeneralisedCrossEntropy(q)(z, batch), (1 - of_labels(z.softmax(1), batch.targets) ** q) / q)


def test_its_gradient_is_cross_entropys_times_a_power_of_the_probability():
    z, batch, _ = problem(5, 4, 0)
    z.requires_grad_()
    (plain,) = torch.autograd.grad(CrossEntropy()(z, batch).sum(), z)
    (robust,) = torch.autograd.grad(GeneralisedCrossEntropy(0.7)(z, batch).sum(), z)
    close(robust, plain * of_labels(z.softmax(1), batch.targets).detach()[:, None] ** 0.7)
    close(GeneralisedCrossEntropy(1e-12)(z, batch).round(decimals=6), CrossEntropy()(z, batch).round(decimals=6))


@given(SIZES, st.floats(0.0, 1.0))
def test_bootstrapping(sizes, beta):
    z, batch, _ = problem(*sizes)
    q = z.softmax(1)
    label = nn.functional.one_hot(batch.targets, z.shape[1]).double()
    likeliest = nn.functional.one_hot(q.argmax(1), z.shape[1]).double()
    for hard, own in ((False, q), (True, likeliest)):
        expected = -((beta * label + (1 - beta) * own) * q.log()).sum(1)
        close(Bootstrapped(beta, hard=hard)(z, batch), expected)


def test_the_defaults_are_those_of_the_papers():
    z, batch, _ = problem(5, 4, 0)
    assert GeneralisedCrossEntropy().q == 0.7
    assert torch.equal(Bootstrapped()(z, batch), Bootstrapped(0.95)(z, batch))
    assert torch.equal(Bootstrapped(hard=True)(z, batch), Bootstrapped(0.8, hard=True)(z, batch))


@given(SIZES)
def test_forward_correction(sizes):
    z, batch, _ = problem(*sizes)
    noise = torch.rand(z.shape[1], z.shape[1]).double() + 0.1
    for matrix in (noise / noise.sum(1, keepdim=True), transition(z.shape[1])):
        close(ForwardCorrected(matrix)(z, batch), -of_labels(z.softmax(1) @ matrix, batch.targets).log())


def test_a_learned_matrix_starts_where_it_is_told_and_has_gradients():
    z, batch, _ = problem(5, 4, 0)
    matrix = 0.9 * torch.eye(4).double() + 0.025
    term = ForwardCorrected(matrix, learned=True).double()
    torch.testing.assert_close(term.transition, matrix, rtol=1e-6, atol=1e-6)  # a parameter is born in float32
    close(term(z, batch), ForwardCorrected(term.transition)(z, batch))
    assert [name for name, _ in term.named_parameters()] == ["free"] and not list(ForwardCorrected(matrix).parameters())

    def loss(free):
        return torch.func.functional_call(term, {"free": free}, (z, batch))

    assert torch.autograd.gradcheck(loss, term.free, check_forward_ad=True)


def test_the_identity_corrects_nothing():
    z, batch, _ = problem(5, 4, 0)
    close(ForwardCorrected(torch.eye(4))(z, batch), CrossEntropy()(z, batch))


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("term", [GeneralisedCrossEntropy(), Bootstrapped(), ForwardCorrected(transition(4))], ids=repr)
def test_extreme_logits_give_finite_losses_and_gradients(term, size):
    z = (size * torch.tensor([1.0, -1.0, 0.0, 1e-4])[torch.randint(4, (10, 4))]).requires_grad_()
    loss = term(z, Batch(None, torch.arange(10) % 4))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_estimating_a_transition_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(12, 3).double(), torch.arange(12) % 3
    found = estimated_transition(model, [(x[:5], y[:5]), Batch(x[5:], y[5:])])
    assert model.training and all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    q = model.eval()(x).detach().double().softmax(1)
    close(found, torch.stack([q[y == c].mean(0) for c in range(3)]))
    assert ForwardCorrected(found).transition.shape == (3, 3)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: GeneralisedCrossEntropy(0.0), r"q is 0\.0, but must be in \(0, 1\]"),
        (lambda: GeneralisedCrossEntropy(float("nan")), "q is nan"),
        (lambda: Bootstrapped(1.5), r"beta is 1\.5, but must be in \[0, 1\]"),
        (lambda: ForwardCorrected("many"), "holds numbers, C rows of C, got str"),
        (lambda: ForwardCorrected(torch.ones(2, 3) / 3), r"shape \(C, C\).*got \(2, 3\)"),
        (lambda: ForwardCorrected([[1.1, -0.1], [0.0, 1.0]]), "negative or infinite"),
        (lambda: ForwardCorrected([[0.5, 0.5], [0.5, 0.6]]), r"row 1 .* has the sum 1\.1, expected 1"),
        (lambda: ForwardCorrected([[1.0, 0.0], [1.0, 0.0]]), "no class is ever labelled 1"),
        (lambda: ForwardCorrected(torch.eye(3), learned=True), r"6 are zero and would stay so; start from a mixture"),
        (lambda: ForwardCorrected(torch.eye(3))(torch.zeros(2, 4), Batch(None, torch.zeros(2).long())), "3 classes"),
        (lambda: estimated_transition(nn.Identity(), []), "batches is empty"),
        (lambda: estimated_transition(nn.Identity(), [(torch.zeros(1, 3), torch.tensor([1]))]), r"classes \[0, 2\]"),
    ],
)
def test_misuse(build, said):
    with pytest.raises(MetaKDError, match=said):
        build()
