"""Soft targets without the teacher's prior, against their formula."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import DebiasedSoftTarget, SoftTarget

SEED = st.integers(0, 2**31 - 1)
COUNTS = st.lists(st.integers(1, 5000), min_size=2, max_size=7)


@given(st.integers(1, 5), COUNTS, SEED, st.floats(0.5, 10.0), st.floats(0.0, 3.0))
def test_the_formula(rows, counts, seed, temperature, tau):
    z = 3 * torch.randn(2, rows, len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    p = ((z[1] - tau * prior.log()) / temperature).softmax(1)
    q = (z[0] / temperature).softmax(1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1)
    found = DebiasedSoftTarget(counts, temperature, tau)(z[0], Batch(None, teacher=z[1]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@given(st.integers(2, 6), SEED, st.floats(0.5, 10.0))
def test_without_imbalance_or_without_strength_it_is_the_soft_target(classes, seed, temperature):
    z = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = Batch(None, teacher=z[1])
    plain = SoftTarget(temperature)(z[0], batch)
    equal = DebiasedSoftTarget([70] * classes, temperature)(z[0], batch)
    weak = DebiasedSoftTarget(range(1, classes + 1), temperature, tau=0.0)(z[0], batch)
    torch.testing.assert_close(equal, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weak, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tau", [-0.5, float("nan"), float("inf")])
def test_a_strength_that_does_not_fit(tau):
    with pytest.raises(MetaKDError, match="tau is"):
        DebiasedSoftTarget([9, 1], tau=tau)
