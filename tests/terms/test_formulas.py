"""Every term against its formula, written out in float64, and through every kind of differentiation."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from metakd.batch import Batch
from metakd.terms import BalancedSoftmax, CrossEntropy, LogitAdjusted, ReverseSoftTarget, SoftTarget

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31 - 1))


def problem(rows, classes, seed, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    teacher = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(classes, (rows,), generator=generator)
    counts = torch.randint(1, 500, (classes,), generator=generator)
    return student, Batch(None, targets, teacher), counts


def cross_entropy(z, targets, smoothing=0.0):
    log_q = (z.double().exp() / z.double().exp().sum(1, keepdim=True)).log()
    wanted = torch.zeros_like(log_q).index_put_((torch.arange(len(z)), targets), torch.tensor(1.0).double())
    wanted = (1 - smoothing) * wanted + smoothing / z.shape[1]
    return -(wanted * log_q).sum(1)


def divergence(a, b, temperature):
    p, q = ((z.double() / temperature).exp() for z in (a, b))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum(1)


@given(SIZES, st.floats(0.0, 0.99))
def test_cross_entropy(sizes, smoothing):
    z, batch, _ = problem(*sizes)
    found = CrossEntropy(label_smoothing=smoothing)(z, batch)
    torch.testing.assert_close(found, cross_entropy(z, batch.targets, smoothing), rtol=1e-10, atol=1e-10)


@given(SIZES, st.floats(0.5, 10.0))
def test_soft_targets(sizes, temperature):
    z, batch, _ = problem(*sizes)
    forward, reverse = SoftTarget(temperature)(z, batch), ReverseSoftTarget(temperature)(z, batch)
    torch.testing.assert_close(forward, divergence(batch.teacher, z, temperature), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(reverse, divergence(z, batch.teacher, temperature), rtol=1e-9, atol=1e-10)


@given(SIZES, st.floats(0.0, 3.0))
def test_class_priors(sizes, tau):
    z, batch, counts = problem(*sizes)
    prior = counts.double() / counts.sum()
    adjusted = cross_entropy(z + tau * prior.log(), batch.targets)
    torch.testing.assert_close(LogitAdjusted(counts, tau)(z, batch), adjusted, rtol=1e-10, atol=1e-10)
    balanced = cross_entropy(z + prior.log(), batch.targets)
    torch.testing.assert_close(BalancedSoftmax(counts.tolist())(z, batch), balanced, rtol=1e-10, atol=1e-10)


def test_the_defaults_are_those_of_the_papers():
    assert CrossEntropy().label_smoothing == 0
    assert SoftTarget().temperature == ReverseSoftTarget().temperature == 4
    assert LogitAdjusted([1, 2]).tau == BalancedSoftmax([1, 2]).tau == 1


def test_a_balanced_prior_changes_nothing():
    z, batch, _ = problem(4, 5, 0)
    torch.testing.assert_close(BalancedSoftmax([7] * 5)(z, batch), CrossEntropy()(z, batch))


@pytest.mark.parametrize("term", [SoftTarget(2.0), ReverseSoftTarget(2.0)])
def test_a_student_that_equals_its_teacher_has_no_loss(term):
    _, batch, _ = problem(4, 5, 0)
    shifted = batch.teacher + torch.arange(4.0)[:, None]
    torch.testing.assert_close(term(shifted, batch), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


def every_term(counts):
    return [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.1),
        SoftTarget(3.0),
        ReverseSoftTarget(3.0),
        BalancedSoftmax(counts),
        LogitAdjusted(counts, tau=0.5),
    ]


ALL = range(len(every_term([1])))


@pytest.mark.parametrize("which", ALL)
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_is_a_label(dtype):
    z, batch, _ = problem(3, 4, 6)
    found = CrossEntropy()(z, batch._replace(targets=batch.targets.to(dtype)))
    torch.testing.assert_close(found, CrossEntropy()(z, batch), rtol=0, atol=0)


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


@pytest.mark.parametrize("term", [SoftTarget(), ReverseSoftTarget()])
def test_no_gradient_flows_into_the_teacher(term):
    z, batch, _ = problem(2, 3, 7)
    teacher = batch.teacher.clone().requires_grad_()
    loss = term(z.requires_grad_(), batch._replace(teacher=teacher))
    assert torch.autograd.grad(loss.sum(), [z, teacher], allow_unused=True)[1] is None
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(batch.teacher, torch.ones_like(batch.teacher))
        loss = term(z.detach(), batch._replace(teacher=moving))
        assert forward_ad.unpack_dual(loss).tangent is None


def test_which_terms_use_the_teacher():
    assert [term.uses_teacher for term in every_term([1, 2])] == [False, False, True, True, False, False]


def test_terms_are_compared_and_printed_by_their_settings():
    assert SoftTarget(2.0) == SoftTarget(2.0) != SoftTarget(3.0)
    assert repr(SoftTarget(2.0)) == "SoftTarget(temperature=2.0)"
    assert repr(LogitAdjusted([3, 4], tau=2)) == "LogitAdjusted(2 classes, tau=2)"


def test_class_priors_work_on_every_device_and_dtype_in_turn():
    term = LogitAdjusted([900, 1])
    batch = Batch(None, torch.tensor([1]))
    narrow = term(torch.zeros(1, 2), batch)
    wide = term(torch.zeros(1, 2).double(), batch)
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert wide.item() == pytest.approx(torch.tensor(901.0).double().log().item(), rel=1e-14)
    assert term(torch.zeros(1, 2, device="meta"), Batch(None, torch.zeros(1, dtype=int, device="meta"))).is_meta
