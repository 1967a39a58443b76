"""Hypergradients in the parameters of terms, against double backward through the steps and finite differences."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, weighting
from metakd._call import train_pass
from metakd._virtual import functional
from metakd.terms import (
    CrossEntropy,
    ForwardCorrected,
    FromTeacher,
    LearnedSoftTarget,
    SmoothedCrossEntropy,
    VectorScaled,
)
from tests.learned_terms.by_hand import LR, Shifted, balancer_of, by_hand, data, grads, student

EXACT = [
    estimators.OneStep(),
    estimators.OneStep("forward"),
    estimators.OneStep("reverse"),
    estimators.Adjoint(),
    estimators.Adjoint("forward"),
    estimators.Unroll(),
    estimators.Truncated(1),
    estimators.IdentityJacobian(),
]
ROUGH = [estimators.FiniteDifference(), estimators.FiniteDifference(sides=1)]


def close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-4, name  # a test of zeros would say nothing
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("estimator", [*EXACT, *ROUGH], ids=str)
def test_one_step(estimator, frozen, direct):
    model, term, balancer = balancer_of(frozen=frozen, direct=direct, estimator=estimator)
    balancer(data(0), data(9))
    expected = by_hand(model, term, balancer, [data(0)], data(9), direct=direct)
    close(grads(term, balancer), expected, 1e-4 if estimator in ROUGH else 1e-10)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [estimators.Adjoint(), estimators.Adjoint("forward"), estimators.Unroll(), estimators.Truncated(3), ROUGH[0]],
    ids=str,
)
def test_three_steps(estimator, direct):
    model, term, balancer = balancer_of(direct=direct, estimator=estimator)
    batches = [data(t) for t in range(3)]
    balancer.meta_step(batches, data(9))
    expected = by_hand(model, term, balancer, batches, data(9), direct=direct)
    close(grads(term, balancer), expected, 1e-4 if estimator in ROUGH else 1e-10)


@pytest.mark.parametrize("estimator", [*EXACT[:4], estimators.OneStep(parameters=["2.*"])], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_check_knows_the_terms_parameters(estimator, frozen):
    _, _, balancer = balancer_of(frozen=frozen, direct=True, estimator=estimator)
    found = check_hypergradient(balancer, [data(0)], data(9))
    names = ["terms.shifted.offset", "terms.shifted.log_scale"]
    assert list(found.estimated) == (names if frozen else ["free", *names])
    assert min(abs(value) for name in names for value in found.estimated[name]) > 0
    if estimator == estimators.Adjoint():
        check_hypergradient(balancer, [data(0), data(1)], data(9))


def in_float64(term):
    (term.term if isinstance(term, FromTeacher) else term).double()
    return term


def test_the_check_finds_a_wrong_gradient():
    class Cut(Shifted):
        def forward(self, outputs, batch):
            z = outputs * self.log_scale.exp() + self.offset.detach()
            return F.cross_entropy(z + 0 * self.offset, batch.targets, reduction="none")

    optimizer = torch.optim.SGD((model := student()).parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"cut": Cut()}, optimizer=optimizer)
    with pytest.raises(MetaKDError, match=r"terms\.cut\.offset: relative error 1\.0e\+00"):
        check_hypergradient(balancer, [data(0)], data(9))


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.OneStep("reverse"), ROUGH[0]], ids=str)
def test_no_further_pass_of_the_student(estimator, monkeypatch):
    def counted(room):
        real = room.call
        monkeypatch.setattr(room, "call", lambda *args: (seen.append(room.__name__), real(*args))[1])

    seen = []
    counted(functional)
    counted(train_pass)
    counts = []
    for learned in (True, False):
        _, term, balancer = balancer_of(estimator=estimator)
        term.requires_grad_(learned)
        balancer(data(0), data(9))  # with the proof
        seen.clear()
        balancer(data(1), data(8))
        counts.append(sorted(seen))
    assert counts[0] == counts[1] and len(counts[0]) == (4 if estimator == ROUGH[0] else 3)


class Reading(nn.Module):
    """A student that leaves its features behind, and terms of its own that read them and its last layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        self.features = torch.tanh(self.body(x))
        return self.head(self.features)


class Hint(nn.Module):
    """Reads what the pass left behind, and a layer of the student."""

    def __init__(self, model):
        super().__init__()
        self.reader = [model]  # no submodule
        self.center = nn.Parameter(torch.linspace(-1, 1, 6).double())

    def forward(self, outputs, batch):
        model = self.reader[0]
        moved = model.features * self.center.sigmoid()
        return (moved - self.center).square().mean(1) + model.head(moved).square().mean(1)


@pytest.mark.parametrize("estimator", [estimators.OneStep("forward"), estimators.OneStep("reverse")], ids=str)
def test_terms_that_read_more_than_outputs(estimator):
    model = Reading().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    terms = {"hard": CrossEntropy(), "hint": Hint(model)}
    balancer = BilevelLossBalancer(model, terms, optimizer=optimizer, estimator=estimator)
    assert list(balancer._step.learned.params()) == ["terms.hint.center"]
    check_hypergradient(balancer, [data(0)], data(9))


class Cube(torch.autograd.Function):
    """An operation that torch function modes do not see."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return 3 * z**2 * g

    @staticmethod
    def jvp(ctx, t):
        return t  # wrong, but the term alone uses it, and terms run in reverse mode


class Odd(nn.Module):
    """Writes to its inputs' copy, uses its parameter twice, and an operation of the user's own."""

    def __init__(self):
        super().__init__()
        self.tau = nn.Parameter(torch.tensor(1.3).double())
        self.alias = [self.tau]

    def forward(self, outputs, batch):
        z = Cube.apply(outputs) * self.alias[0]
        z[:, 0] += self.tau
        return F.cross_entropy(z, batch.targets, reduction="none") + outputs.detach().square().mean(1) * self.tau


def test_operations_and_places_of_a_users_own():
    optimizer = torch.optim.SGD((model := student()).parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"odd": Odd()}, optimizer=optimizer, estimator=estimators.OneStep("reverse"))
    check_hypergradient(balancer, [data(0)], data(9))


def test_a_term_that_reads_its_parameter_where_it_cannot_be_swapped():
    class Hidden(Shifted):
        def __init__(self):
            super().__init__()
            self.hidden = weakref.ref(self.offset)

        def forward(self, outputs, batch):
            return F.cross_entropy(outputs + self.hidden(), batch.targets, reduction="none") + 0 * self.offset.sum()

    optimizer = torch.optim.SGD((model := student()).parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"hidden": Hidden()}, optimizer=optimizer)
    with pytest.raises(MetaKDError, match=r"'terms\.hidden\.offset' \(0 in place of"):
        balancer(data(0), data(9))


@pytest.mark.parametrize(
    "term",
    [
        ForwardCorrected(0.8 * torch.eye(3) + 0.2 / 3, learned=True),
        VectorScaled(3),
        FromTeacher(VectorScaled(3), 0),
        LearnedSoftTarget(2),
        FromTeacher(LearnedSoftTarget(), 1),
        SmoothedCrossEntropy(),
        SmoothedCrossEntropy(classes=3),
    ],
    ids=str,
)
def test_the_librarys_own_terms(term):
    model = student()
    fixed = weighting.TermScalars(1, init=1.0).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    teachers = [nn.Linear(4, 3).double(), nn.Linear(4, 3).double()]
    balancer = BilevelLossBalancer(
        model, {"learned": in_float64(term)}, optimizer=optimizer, weighting=fixed, teacher=teachers
    )
    check_hypergradient(balancer, [data(0)], data(9))


class Projected(nn.Module):
    """Mixes the logits by a matrix product, which autocast runs in half precision."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(3) + 0.1)

    def forward(self, outputs, batch):
        return F.cross_entropy((outputs @ self.mix).float(), batch.targets, reduction="none")


@pytest.mark.parametrize("term", [Shifted, Projected])
def test_mixed_precision(term):
    model, term = student().float(), term().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    balancer = BilevelLossBalancer(model, {"own": term}, optimizer=optimizer)
    x, y = data(0)
    balancer((x.float(), y), (x.float(), y))
    first = next(term.parameters())
    exact = first.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        balancer((x.float(), y), (x.float(), y)).backward()
    assert (first.grad - exact).norm() < 0.1 * exact.norm()
