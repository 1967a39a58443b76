"""A term for one teacher of an ensemble: its loss, its name, and what it refuses."""

import pickle

import pytest
import torch

from metakd import Batch, MetaKDError
from metakd.terms import CrossEntropy, FromTeacher, GatedSoftTarget, SoftTarget, evaluate, named

Z, TEACHERS = torch.randn(4, 3), [torch.randn(4, 3), torch.randn(4, 3)]
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("term", [SoftTarget(2.0), GatedSoftTarget()])
@pytest.mark.parametrize("together", [list, tuple])
def test_it_is_the_term_with_that_teacher(term, together):
    batch = Batch(None, LABELS, teacher=together(TEACHERS))
    for k, one in enumerate(TEACHERS):
        found = pickle.loads(pickle.dumps(FromTeacher(term, k)))(Z, batch)
        assert torch.equal(found, term(Z, batch._replace(teacher=one)))


def test_names_and_needs():
    assert list(named([FromTeacher(SoftTarget(), k) for k in range(2)])) == ["from_teacher", "from_teacher_2"]
    assert FromTeacher(SoftTarget(), 0).uses_teacher


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (None, r"picks teacher 1 of a list of outputs, but batch.teacher is None; .*teacher=\[first, second\]"),
        (TEACHERS[0], r"batch.teacher is of type Tensor; .*Batch\(teacher=\[\.\.\.\]\)"),
        (TEACHERS[:1], r"there is no teacher 1: batch.teacher has 1 outputs"),
        (torch.stack(TEACHERS), r"one tensor of shape \(2, 4, 3\).*unbind\(0\) for \(teachers, B, C\)"),
        ([TEACHERS[0], TEACHERS[1][:, :2]], r"shape \(4, 2\), the student's \(4, 3\)"),
    ],
)
def test_batches_without_such_a_teacher(teacher, words):
    with pytest.raises(MetaKDError, match=words):
        evaluate({"second": FromTeacher(SoftTarget(), 1)}, Z, Batch(None, LABELS, teacher=teacher))


def test_stacked_outputs_where_one_teacher_is_expected():
    with pytest.raises(MetaKDError, match=r"one tensor of shape \(4, 2, 3\); .*unbind\(1\)\)\) for the shape \(B, te"):
        SoftTarget()(Z, Batch(None, LABELS, teacher=torch.stack(TEACHERS, 1)))


@pytest.mark.parametrize(("term", "teacher"), [(CrossEntropy, 0), (3, 0), (SoftTarget(), -1), (SoftTarget(), True)])
def test_what_is_no_term_or_position(term, teacher):
    with pytest.raises(MetaKDError, match=r"FromTeacher needs a term|must be a position in the list"):
        FromTeacher(term, teacher)
