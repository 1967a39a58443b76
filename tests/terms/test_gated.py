"""Soft cross-entropy with a gate, against its formula, and the gate where the teacher has no loss."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from metakd.batch import Batch
from metakd.terms import GatedSoftTarget
from tests.terms.problems import problem


def gate(z, batch):
    rows = torch.arange(len(z))
    students, teachers = (-x.softmax(1)[rows, batch.targets].log() for x in (z.detach(), batch.teacher))
    return 1 - (-students / teachers).exp()


def soft_cross_entropy(z, batch, temperature):
    return -((batch.teacher / temperature).softmax(1) * (z / temperature).softmax(1).log()).sum(1)


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31 - 1), st.floats(0.5, 10.0))
def test_the_formula(rows, classes, seed, temperature):
    z, batch, _ = problem(rows, classes, seed, scale=2.0)
    expected = temperature**2 * gate(z, batch) * soft_cross_entropy(z, batch, temperature)
    torch.testing.assert_close(GatedSoftTarget(temperature)(z, batch), expected, rtol=1e-8, atol=1e-9)


def test_derivatives_take_the_gate_for_a_constant():
    z, batch, _ = problem(3, 4, 0, scale=2.0)
    term, here = GatedSoftTarget(3.0), gate(z, batch)

    def with_the_gate_held(z):
        return term(z, batch) * (here / gate(z, batch))

    z.requires_grad_()
    assert gradcheck(with_the_gate_held, z, check_forward_ad=True)
    assert gradgradcheck(with_the_gate_held, z, check_fwd_over_rev=True)
    (gradient,) = torch.autograd.grad(term(z, batch).sum(), z)
    (expected,) = torch.autograd.grad((9 * here * soft_cross_entropy(z, batch, 3.0)).sum(), z)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_the_teacher_has_no_loss_the_gate_is_its_limit(dtype):
    teacher = torch.tensor([[1e4, 0.0]] * 3, dtype=dtype)
    z = torch.tensor([[0.0, 1.0], [0.0, 1e4], [1e4, 0.0]], dtype=dtype, requires_grad=True)
    batch = Batch(None, torch.zeros(3, dtype=torch.int64), teacher)
    loss = GatedSoftTarget(1.0)(z, batch)
    expected = torch.tensor([1.3132617, 1e4, 0.0]).to(loss.dtype)  # gates 1, 1 and, as both have none, 0
    torch.testing.assert_close(loss, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()


def test_a_student_with_the_teachers_loss_has_the_gate_of_a_tie():
    _, batch, _ = problem(4, 5, 1, scale=2.0)
    found = GatedSoftTarget(2.0)(batch.teacher, batch)
    tie = 1 - torch.tensor(-1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(found, 4 * tie * soft_cross_entropy(batch.teacher, batch, 2.0))


def test_the_gate_has_no_tangent():
    z, batch, _ = problem(2, 3, 2, scale=2.0)
    direction = torch.randn_like(z)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(GatedSoftTarget(2.0)(forward_ad.make_dual(z, direction), batch)).tangent
        soft = forward_ad.unpack_dual(soft_cross_entropy(forward_ad.make_dual(z, direction), batch, 2.0)).tangent
    torch.testing.assert_close(tangent, 4 * gate(z, batch) * soft)
