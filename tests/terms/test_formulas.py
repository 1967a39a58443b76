"""The terms against their formulas, written out in float64; those with a file of their own have a test file too."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd.batch import Batch
from metakd.terms import (
    BalancedSoftmax,
    CrossEntropy,
    GatedSoftTarget,
    GroupTarget,
    LogitAdjusted,
    NonTargetClass,
    RebalancedSoftTarget,
    ReverseSoftTarget,
    SoftTarget,
    TargetClass,
    WithinGroupTarget,
)
from tests.terms.problems import problem

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31 - 1))


def cross_entropy(z, targets, smoothing=0.0):
    log_q = (z.double().exp() / z.double().exp().sum(1, keepdim=True)).log()
    wanted = torch.zeros_like(log_q).index_put_((torch.arange(len(z)), targets), torch.tensor(1.0).double())
    wanted = (1 - smoothing) * wanted + smoothing / z.shape[1]
    return -(wanted * log_q).sum(1)


def probabilities(z, temperature):
    e = (z.double() / temperature).exp()
    return e / e.sum(1, keepdim=True)


def divergence(a, b, temperature):
    p, q = probabilities(a, temperature), probabilities(b, temperature)
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


@given(SIZES, st.floats(0.5, 10.0), st.floats(0.1, 3.0))
def test_a_power_of_the_teachers_probabilities(sizes, temperature, power):
    z, batch, _ = problem(*sizes)
    p, q = probabilities(batch.teacher, temperature) ** power, probabilities(z, temperature)
    p = p / p.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    found = SoftTarget(temperature, power=power)(z, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


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
    assert SoftTarget().power == 1
    assert LogitAdjusted([1, 2]).tau == BalancedSoftmax([1, 2]).tau == 1
    assert (RebalancedSoftTarget([1, 2]).temperature, RebalancedSoftTarget([1, 2]).beta) == (2, 0.9999)
    assert GatedSoftTarget().temperature == TargetClass().temperature == NonTargetClass().temperature == 4
    assert GroupTarget([1, 2, 3]).temperature == WithinGroupTarget([1, 2, 3]).temperature == 4


def test_a_balanced_prior_changes_nothing():
    z, batch, _ = problem(4, 5, 0)
    torch.testing.assert_close(BalancedSoftmax([7] * 5)(z, batch), CrossEntropy()(z, batch))


@pytest.mark.parametrize("family", [SoftTarget, ReverseSoftTarget, TargetClass, NonTargetClass])
def test_a_student_that_equals_its_teacher_has_no_loss(family):
    _, batch, _ = problem(4, 5, 0)
    shifted = batch.teacher + torch.arange(4.0)[:, None]
    torch.testing.assert_close(family(2.0)(shifted, batch), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_is_a_label(dtype):
    z, batch, _ = problem(3, 4, 6)
    found = CrossEntropy()(z, batch._replace(targets=batch.targets.to(dtype)))
    torch.testing.assert_close(found, CrossEntropy()(z, batch), rtol=0, atol=0)


def test_class_priors_work_on_every_device_and_dtype_in_turn():
    term = LogitAdjusted([900, 1])
    batch = Batch(None, torch.tensor([1]))
    narrow = term(torch.zeros(1, 2), batch)
    wide = term(torch.zeros(1, 2).double(), batch)
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert wide.item() == pytest.approx(torch.tensor(901.0).double().log().item(), rel=1e-14)
