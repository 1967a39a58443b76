"""What every term has in common: derivatives, dtypes, extreme logits, a teacher that gets no gradient."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from metakd.batch import Batch
from metakd.terms import (
    ForwardCorrected,
    GroupTarget,
    LogitAdjusted,
    RebalancedSoftTarget,
    ReverseSoftTarget,
    SoftTarget,
)
from tests.terms.problems import ALL, SOME, TAUGHT, WITHOUT_CONSTANTS, every_term, problem


@pytest.mark.parametrize("which", WITHOUT_CONSTANTS)
@pytest.mark.parametrize("rows", [1, 3])
def test_first_and_second_derivatives(which, rows):
    z, batch, counts = problem(rows, 4, 1, scale=1.0)
    term = every_term(counts)[which]
    z.requires_grad_()
    assert gradcheck(lambda z: term(z, batch), z, check_forward_ad=True)
    assert gradgradcheck(lambda z: term(z, batch), z, check_fwd_over_rev=True)


@pytest.mark.parametrize("which", ALL)
def test_a_directional_derivative_of_float32_dual_numbers(which):
    z, batch, counts = problem(3, 4, 2)
    term, direction = every_term(counts)[which], torch.randn_like(z)
    wide = torch.autograd.functional.jvp(lambda z: term(z, batch), z, direction)[1]
    with forward_ad.dual_level():
        loss = term(forward_ad.make_dual(z.float(), direction.float()), batch)
        tangent = forward_ad.unpack_dual(loss).tangent
    assert tangent.dtype == torch.float32
    torch.testing.assert_close(tangent.double(), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_the_students_but_at_least_float32(which, dtype):
    z, batch, counts = problem(3, 4, 3, dtype)
    loss = every_term(counts)[which](z, batch)
    assert loss.shape == (3,)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = every_term(counts)[which](z.double(), batch)
    torch.testing.assert_close(loss.double(), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ALL)
def test_autocast_does_not_cost_digits(which):
    z, batch, counts = problem(3, 4, 4, torch.float32)
    term = every_term(counts)[which]
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(z, batch)
    torch.testing.assert_close(loss, term(z, batch), rtol=0, atol=0)


@pytest.mark.parametrize("which", ALL)
def test_outputs_with_logits_are_read(which):
    z, batch, counts = problem(3, 4, 5)
    term = every_term(counts)[which]
    wrapped = batch._replace(teacher=SimpleNamespace(logits=batch.teacher))
    torch.testing.assert_close(term(SimpleNamespace(logits=z), wrapped), term(z, batch), rtol=0, atol=0)


@pytest.mark.parametrize("which", TAUGHT)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_of_either_sign_give_finite_losses_and_derivatives(which, size):
    def loss_of(z):
        return SOME[which](z, Batch(None, torch.arange(10) % 4, size * signs))

    signs = torch.tensor([1.0, -1.0, 0.0, 1e-4])[torch.randint(4, (10, 4))]
    z = (size * signs.roll(1, 0)).requires_grad_()
    loss = loss_of(z)
    (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.randn_like(z)).sum(), z)
    with forward_ad.dual_level():
        dual = loss_of(forward_ad.make_dual(z.detach(), torch.ones_like(z)))
        tangent = forward_ad.unpack_dual(dual).tangent
    for value in (loss, gradient, second, tangent):
        assert value.isfinite().all()
    assert loss.max() > 0.1 * size and gradient.abs().max() > 0.1


@pytest.mark.parametrize("which", TAUGHT)
def test_classes_that_both_networks_mask_give_no_nan(which):
    z, batch, _ = problem(8, 4, 8)
    masked = torch.tensor([False, True, False, True])  # class 1 is the whole tail
    z, teacher = (x.masked_fill(masked, -torch.inf).requires_grad_() for x in (z, batch.teacher))
    loss = SOME[which](z, batch._replace(targets=torch.arange(8) % 2 * 2, teacher=teacher))
    (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    for value in (loss, gradient, second):
        assert value.isfinite().all()


@pytest.mark.parametrize("which", TAUGHT)
def test_no_gradient_flows_into_the_teacher(which):
    term = SOME[which]
    z, batch, _ = problem(2, 4, 7)
    teacher = batch.teacher.clone().requires_grad_()
    loss = term(z.requires_grad_(), batch._replace(teacher=teacher))
    assert torch.autograd.grad(loss.sum(), [z, teacher], allow_unused=True)[1] is None
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(batch.teacher, torch.ones_like(batch.teacher))
        loss = term(z.detach(), batch._replace(teacher=moving))
        assert forward_ad.unpack_dual(loss).tangent is None


def test_which_terms_use_the_teacher():
    assert [term.uses_teacher for term in SOME] == [False, False, True, True] + [False] * 6 + [True] * 8


def test_terms_are_compared_and_printed_by_their_settings():
    assert SoftTarget(2.0) == SoftTarget(2.0) != SoftTarget(3.0)
    assert SoftTarget(2.0) != SoftTarget(2.0, power=0.5)
    assert repr(SoftTarget(2.0)) == "SoftTarget(temperature=2.0, power=1.0)"
    assert repr(ReverseSoftTarget(2.0)) == "ReverseSoftTarget(temperature=2.0)"
    assert GroupTarget([3, 4, 5]) == GroupTarget(torch.tensor([3, 4, 5])) != GroupTarget([3, 4, 6])
    assert repr(RebalancedSoftTarget([3, 4])) == "RebalancedSoftTarget(temperature=2.0, beta=0.9999)"
    assert repr(LogitAdjusted([3, 4], tau=2)) == "LogitAdjusted(2 classes, tau=2)"
    assert repr(ForwardCorrected(torch.eye(2))) == "ForwardCorrected(2 classes, learned=False)"


@pytest.mark.parametrize("which", ALL)
def test_no_term_looks_at_values_or_leaves_the_device(which):
    z = torch.zeros(2, 4, device="meta")
    loss = SOME[which](z, Batch(None, torch.zeros(2, dtype=int, device="meta"), z))
    assert loss.is_meta and loss.shape == (2,)


@pytest.mark.parametrize("which", ALL)
def test_a_term_is_frozen_and_survives_a_copy(which):
    z, batch, counts = problem(3, 4, 9)
    term = every_term(counts)[which]
    loss = term(z, batch)
    torch.testing.assert_close(copy.deepcopy(term)(z, batch), loss, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(term))(z, batch), loss, rtol=0, atol=0)
    if dataclasses.is_dataclass(term):
        name = next(iter(dataclasses.fields(term))).name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(term, name, 1.0)


@pytest.mark.parametrize("term", [SoftTarget(1.0), ReverseSoftTarget(1.0), SoftTarget(), ReverseSoftTarget()])
@pytest.mark.parametrize("size", [1e3, 1e30, 3e38, float("inf")])
def test_extreme_logits_give_no_nan(term, size):
    def loss_of(z):
        return term(z, Batch(None, teacher=spread.flip(0)))

    spread = torch.tensor([[0.0, -size, 1.0], [0.0, -size, 0.5]])
    z = spread.clone().requires_grad_()
    loss = loss_of(z)
    (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    with forward_ad.dual_level():
        dual = loss_of(forward_ad.make_dual(spread, torch.ones_like(spread)))
        tangent = forward_ad.unpack_dual(dual).tangent
    for value in (loss, gradient, second, tangent):
        assert value.isfinite().all()
    without = spread[:, [0, 2]]
    torch.testing.assert_close(loss, term(without, Batch(None, teacher=without.flip(0))))


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_a_confident_student_that_contradicts_its_teacher_has_a_large_finite_loss(size):
    z, teacher = torch.tensor([[size, -size]]), torch.tensor([[-size, size]])
    assert SoftTarget(1.0)(z, Batch(None, teacher=teacher)).item() == pytest.approx(2 * size)
    assert ReverseSoftTarget(1.0)(z, Batch(None, teacher=teacher)).item() == pytest.approx(2 * size)
