"""Distillation between and within head, medium and tail, against the formulas and against the whole."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import GroupTarget, SoftTarget, WithinGroupTarget
from metakd.terms.counts import thirds

CASES = st.tuples(st.integers(1, 5), st.permutations(range(3, 13)), st.integers(3, 10), st.integers(0, 2**31 - 1))


def networks(rows, ranks, classes, seed):
    z = 3 * torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = [rank**3 for rank in ranks[:classes]]
    ordered = sorted(range(classes), key=lambda c: counts[c], reverse=True)
    third = {3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 3, 9: 3, 10: 3}[classes]
    groups = [ordered[:third], ordered[third : classes - third], ordered[classes - third :]]
    return z[0], Batch(None, teacher=z[1]), counts, groups


def masses(p, groups):
    return torch.stack([p[:, group].sum(1) for group in groups], 1)


def kl(p, q):
    return (p * (p / q).log()).sum(1)


@given(CASES, st.floats(0.5, 10.0))
def test_the_formula_between_groups(case, temperature):
    z, batch, counts, groups = networks(*case)
    p, q = (masses((x / temperature).softmax(1), groups) for x in (batch.teacher, z))
    scaled = p * (len(z) / 3 / p.sum(0))
    torch.testing.assert_close(scaled.sum(0), torch.full((3,), len(z) / 3, dtype=torch.float64))
    expected = temperature**2 * kl(scaled / scaled.sum(1, keepdim=True), q)
    torch.testing.assert_close(GroupTarget(counts, temperature)(z, batch), expected, rtol=1e-7, atol=1e-9)


@given(CASES, st.floats(0.5, 10.0))
def test_the_formula_within_groups(case, temperature):
    z, batch, counts, groups = networks(*case)
    expected = torch.zeros(len(z), dtype=torch.float64)
    for group in groups:
        p, q = ((x / temperature).softmax(1)[:, group] for x in (batch.teacher, z))
        expected += temperature**2 * kl(p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True))
    torch.testing.assert_close(WithinGroupTarget(counts, temperature)(z, batch), expected, rtol=1e-7, atol=1e-9)


def test_groups_of_one_class_are_the_classes():
    z, batch = torch.randn(2, 6, 3, dtype=torch.float64)
    shifted = torch.stack([batch[0].roll(k) for k in range(3)] + [batch[1].roll(k) for k in range(3)])
    batch = Batch(None, teacher=shifted)  # a teacher that favours no class: there is nothing to rebalance
    torch.testing.assert_close(GroupTarget([5, 9, 2])(z, batch), SoftTarget()(z, batch), rtol=1e-9, atol=1e-10)
    within = WithinGroupTarget([5, 9, 2])(z, batch)
    torch.testing.assert_close(within, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_parts_make_up_ordinary_distillation_where_the_teacher_is_balanced():
    counts, groups = [60, 50, 40, 30, 20, 10], [[0, 1], [2, 3], [4, 5]]
    row, z = torch.randn(6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    batch = Batch(None, teacher=torch.stack([row.roll(2 * k) for k in range(3)]))
    whole = GroupTarget(counts, 2.0)(z, batch)
    for group in groups:
        p, q = ((x / 2).softmax(1)[:, group] for x in (batch.teacher, z))
        whole = whole + 4 * p.sum(1) * kl(p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True))
    torch.testing.assert_close(whole, SoftTarget(2.0)(z, batch), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_the_teacher_says_of_every_sample_is_its_bias_and_goes(rows):
    z, _, counts, groups = networks(rows, range(10, 0, -1), 9, 0)
    towards_the_head = torch.tensor(counts, dtype=torch.float64).log().expand(rows, 9)
    q = masses(z.softmax(1), groups)
    found = GroupTarget(counts, 1.0)(z, Batch(None, teacher=towards_the_head))
    torch.testing.assert_close(found, kl(torch.full_like(q, 1 / 3), q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_any_mass_stays_without(dtype):
    z, teacher = torch.randn(2, 4, 4, dtype=dtype)
    z[:, 2:], teacher[:, 2:] = -torch.inf, -torch.inf
    p, q = (x[:, :2].softmax(1) for x in (teacher, z))
    scaled = p / p.sum(0)
    found = GroupTarget([9, 8, 7, 7, 3, 2], 1.0)  # groups 0 1, 2 3, 4 5
    wide = [torch.stack([x[:, 0], x[:, 0], x[:, 1], x[:, 1], x[:, 2], x[:, 3]], 1) for x in (z, teacher)]
    expected = kl(scaled / scaled.sum(1, keepdim=True), q)
    torch.testing.assert_close(found(wide[0], Batch(None, teacher=wide[1])), expected)


def test_samples_are_coupled_through_the_teacher_alone():
    z, batch, counts, _ = networks(4, range(10, 0, -1), 6, 1)
    z.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda z: GroupTarget(counts)(z, batch), z).abs().sum(2)
    assert (jacobian.diagonal() > 0).all() and jacobian.fill_diagonal_(0).max() == 0
    other = batch.teacher.clone()
    other[0] += torch.arange(6.0)
    moved = GroupTarget(counts)(z, batch._replace(teacher=other)) - GroupTarget(counts)(z, batch)
    assert (moved[1:].abs() > 1e-6).all()
    moved = WithinGroupTarget(counts)(z, batch._replace(teacher=other)) - WithinGroupTarget(counts)(z, batch)
    assert moved[0].abs() > 1e-6 and (moved[1:] == 0).all()


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [(3, [1, 1, 1]), (4, [1, 2, 1]), (5, [2, 1, 2]), (10, [3, 4, 3]), (100, [33, 34, 33]), (1000, [330, 340, 330])],
)
def test_thirds(classes, sizes):
    head, medium, tail = thirds(range(classes))
    assert [len(head), len(medium), len(tail)] == sizes
    assert sorted(head + medium + tail) == list(range(classes))
    assert min(head) > max(medium) and min(medium) > max(tail)


def test_of_equal_counts_the_lower_class_comes_first():
    assert thirds([7] * 6) == ((0, 1), (2, 3), (4, 5))


def test_thirds_of_two_classes():
    with pytest.raises(MetaKDError, match="at least three classes, but there are 2"):
        thirds([3, 4])
