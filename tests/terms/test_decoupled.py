"""Both parts of decoupled distillation, against their formulas and against the whole."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from metakd.batch import Batch
from metakd.terms import NonTargetClass, SoftTarget, TargetClass
from tests.terms.problems import problem

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31 - 1))


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


@given(SIZES, st.floats(0.5, 10.0))
def test_the_formulas(sizes, temperature):
    z, batch, _ = problem(*sizes)
    target, rest = [], []
    for label, student, teacher in zip(batch.targets.tolist(), z, batch.teacher, strict=True):
        p, q = ((x / temperature).softmax(0) for x in (teacher, student))
        target.append(temperature**2 * kl((p[label], 1 - p[label]), (q[label], 1 - q[label])))
        others = [c for c in range(len(p)) if c != label]
        rest.append(temperature**2 * kl(p[others] / p[others].sum(), q[others] / q[others].sum()))
    torch.testing.assert_close(TargetClass(temperature)(z, batch), torch.stack(target), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(NonTargetClass(temperature)(z, batch), torch.stack(rest), rtol=1e-7, atol=1e-9)


@given(SIZES, st.floats(0.5, 10.0))
def test_the_parts_make_up_ordinary_distillation(sizes, temperature):
    z, batch, _ = problem(*sizes)
    sure = (batch.teacher / temperature).softmax(1)[torch.arange(len(z)), batch.targets]
    whole = TargetClass(temperature)(z, batch) + (1 - sure) * NonTargetClass(temperature)(z, batch)
    torch.testing.assert_close(whole, SoftTarget(temperature)(z, batch), rtol=1e-9, atol=1e-10)


@given(SIZES)
def test_each_part_is_blind_to_the_other(sizes):
    z, batch, _ = problem(*sizes)
    label = torch.nn.functional.one_hot(batch.targets, z.shape[1]).bool()
    surer = torch.where(label, z + 5, z)
    torch.testing.assert_close(NonTargetClass()(surer, batch), NonTargetClass()(z, batch), rtol=0, atol=0)
    reversed_rest = torch.stack([torch.cat([row[:1], row[1:].flip(0)]) for row in z])
    first = batch._replace(targets=torch.zeros(len(z), dtype=torch.int64))
    torch.testing.assert_close(TargetClass()(reversed_rest, first), TargetClass()(z, first), rtol=1e-9, atol=1e-10)


def test_a_sure_teacher_still_tells_the_other_classes_apart():
    z, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1e4, 1.0, 0.0]])
    batch = Batch(None, torch.tensor([0]), teacher)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    expected = (p * (2 * p).log()).sum()
    torch.testing.assert_close(NonTargetClass(1.0)(z, batch), expected[None], rtol=1e-3, atol=0)


def test_two_classes_leave_nothing_to_tell_apart():
    z, batch, _ = problem(4, 2, 0)
    torch.testing.assert_close(NonTargetClass()(z, batch), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(TargetClass()(z, batch), SoftTarget()(z, batch))


def test_where_every_other_class_is_masked_nothing_is_left_to_learn():
    z = torch.tensor([[1.0, -torch.inf, -torch.inf]], requires_grad=True)
    batch = Batch(None, torch.tensor([0]), z)
    loss = TargetClass()(z, batch) + NonTargetClass()(z, batch)
    assert loss.item() == 0 and (torch.autograd.grad(loss.sum(), z)[0] == 0).all()
