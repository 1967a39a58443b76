"""Terms that learn a temperature, teachers' shares, or smoothing, against their formulas and fixed relatives."""

import pytest
import torch
import torch.nn.functional as F

from metakd import Batch, MetaKDError
from metakd.terms import LearnedSoftTarget, SmoothedCrossEntropy, SoftTarget
from tests.terms.problems import problem


def close(one, other):
    torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_one_teacher_is_a_soft_target(temperature):
    z, batch, _ = problem(6, 4, 0)
    term = LearnedSoftTarget(temperature=temperature).double()
    term.log_temperature.data = torch.tensor(temperature).double().log()  # parameters are born in float32
    close(term(z, batch), SoftTarget(temperature)(z, batch))
    close(term(z, batch._replace(teacher=[batch.teacher])), SoftTarget(temperature)(z, batch))
    assert [name for name, _ in term.named_parameters()] == ["log_temperature"]
    assert term.shares.tolist() == [1.0] and term.temperature == pytest.approx(temperature)


def test_several_teachers_are_mixed_by_their_shares():
    z, batch, _ = problem(6, 4, 0)
    teachers = [problem(6, 4, seed)[0] for seed in (1, 2, 3)]
    term = LearnedSoftTarget(3, temperature=2.0).double()
    term.log_temperature.data = torch.tensor(2.0).double().log()
    term.free_shares.data = torch.tensor([0.3, -1.0, 2.0]).double()
    shares = term.free_shares.softmax(0)
    p = sum(a * (t / 2).softmax(1) for a, t in zip(shares, teachers, strict=True))
    q = (z / 2).softmax(1)
    close(term(z, batch._replace(teacher=teachers)), (4 * (p * (p / q).log()).sum(1)).detach())
    close(term.shares, shares.detach())
    assert repr(term) == "LearnedSoftTarget(3 teachers, temperature=2)"


@pytest.mark.parametrize("classes", [None, 4])
def test_smoothing_is_that_of_the_cross_entropy(classes):
    z, batch, _ = problem(6, 4, 0)
    term = SmoothedCrossEntropy(0.3, classes=classes).double()
    term.free.data = torch.full_like(term.free, 0.3).logit()
    close(term(z, batch), F.cross_entropy(z, batch.targets, label_smoothing=0.3, reduction="none"))
    if classes:
        e = torch.tensor([0.1, 0.2, 0.6, 0.4]).double()
        term.free.data = e.logit()
        own = [
            F.cross_entropy(row[None], y[None], label_smoothing=float(e[y]))
            for row, y in zip(z, batch.targets, strict=True)
        ]
        close(term(z, batch), torch.stack(own))
        close(term.smoothing, e)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: LearnedSoftTarget(0), "teachers is 0"),
        (lambda: LearnedSoftTarget(temperature=0.0), r"temperature is 0\.0, but must be positive"),
        (lambda: LearnedSoftTarget(2)(*two(3)), r"mixes 2 teachers, but batch.teacher has 3 outputs.*teachers=3"),
        (lambda: LearnedSoftTarget(2)(torch.zeros(2, 3), Batch(None)), "the teacher's outputs are missing"),
        (lambda: LearnedSoftTarget(3)(*stacked()), "if these are several teachers, give a list"),
        (lambda: LearnedSoftTarget(temperature="4"), "temperature is '4', but must be positive"),
        (lambda: SmoothedCrossEntropy("a"), "smoothing is 'a', but"),
        (lambda: LearnedSoftTarget()(torch.zeros(2, 3), Batch(None)), "the teacher's outputs are missing"),
        (lambda: SmoothedCrossEntropy(0.0), r"smoothing is 0\.0, but must be in \(0, 1\)"),
        (lambda: SmoothedCrossEntropy(classes=0), "classes is 0"),
        (lambda: SmoothedCrossEntropy(classes=2)(*two(1)), r"smoothing for 2 classes .* has 3 outputs; pass classes=3"),
    ],
)
def test_misuse(build, said):
    with pytest.raises(MetaKDError, match=said):
        build()


def two(teachers):
    return torch.zeros(2, 3), Batch(None, torch.zeros(2).long(), [torch.zeros(2, 3)] * teachers)


def stacked():
    return torch.zeros(2, 3), Batch(None, teacher=torch.zeros(2, 3, 3))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_masked_classes_have_finite_derivatives(temperature):
    z, batch, _ = problem(3, 4, 0)
    z[:, 0], batch.teacher[:, 0] = -torch.inf, -torch.inf
    term = LearnedSoftTarget().double()
    term.log_temperature.data = torch.tensor(temperature).double().log()
    loss = term(z.requires_grad_(), batch)
    close(loss, SoftTarget(temperature)(z.detach(), batch))
    loss.sum().backward()
    assert bool(z.grad.isfinite().all()) and bool(term.log_temperature.grad.isfinite())
