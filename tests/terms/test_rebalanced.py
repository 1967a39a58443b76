"""Soft targets weighted by the effective number of samples, against their formula."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd.batch import Batch
from metakd.terms import RebalancedSoftTarget, SoftTarget

SEED = st.integers(0, 2**31 - 1)
COUNTS = st.lists(st.integers(1, 5000), min_size=2, max_size=7)


def networks(rows, classes, seed):
    z = 3 * torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z[0], Batch(None, teacher=z[1])


@given(st.integers(1, 5), COUNTS, SEED, st.floats(0.5, 10.0), st.sampled_from([0.0, 0.5, 0.99, 0.9999, 0.999999]))
def test_the_formula(rows, counts, seed, temperature, beta):
    z, batch = networks(rows, len(counts), seed)
    weights = torch.tensor([(1 - beta) / (1 - beta**n) for n in counts], dtype=torch.float64)
    p = (batch.teacher / temperature).softmax(1) * weights
    p = p / p.sum(1, keepdim=True)
    q = (z / temperature).softmax(1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1)
    found = RebalancedSoftTarget(counts, temperature, beta)(z, batch)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@given(st.integers(1, 5), st.integers(2, 6), SEED, st.floats(0.5, 10.0))
def test_without_imbalance_or_without_beta_it_is_the_soft_target(rows, classes, seed, temperature):
    z, batch = networks(rows, classes, seed)
    plain = SoftTarget(temperature)(z, batch)
    equal = RebalancedSoftTarget([70] * classes, temperature)(z, batch)
    unweighted = RebalancedSoftTarget(range(1, classes + 1), temperature, beta=0.0)(z, batch)
    torch.testing.assert_close(equal, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(unweighted, plain, rtol=1e-10, atol=1e-10)


def test_counts_far_beyond_the_effective_number_keep_their_digits():
    z, batch = networks(3, 2, 0)
    many = RebalancedSoftTarget([10**12, 10**12 + 1])(z, batch)
    torch.testing.assert_close(many, SoftTarget(2.0)(z, batch), rtol=1e-10, atol=0)
    rare = RebalancedSoftTarget([1e-9, 3e-9])(z, batch)
    torch.testing.assert_close(rare, RebalancedSoftTarget([1e-6, 3e-6])(z, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("counts", [[900, 30, 4], torch.tensor([900.0, 30.0, 4.0])])
def test_the_gradient_pulls_towards_rare_classes(counts):
    z = torch.zeros(1, 3, requires_grad=True)
    batch = Batch(None, teacher=torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(RebalancedSoftTarget(counts)(z, batch).sum(), z)
    assert gradient[0, 0] > gradient[0, 1] > 0 > gradient[0, 2]
