"""A loader's item on its way to the student: what is read, what it is called with, and what is said where it fails."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from metakd import Batch, MetaKDError
from metakd._basics.module_call import call
from metakd._call.read import read_batch
from metakd._virtual.functional import FunctionalStudent
from metakd.batch import as_batch
from metakd.terms import CrossEntropy, SoftTarget

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x1, x2):
        return self.layer(x1) + x2


def read(item, teacher=None, needed_by=None, batch_fn=as_batch):
    return read_batch(item, "the batch", batch_fn, teacher, FunctionalStudent(Two()), needed_by)


def error(function, *args, **kwargs):
    with pytest.raises(MetaKDError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_the_teachers_outputs_are_read():
    teacher = nn.Linear(3, 5)
    assert read((X, Y)).teacher is None
    torch.testing.assert_close(read((X, Y), teacher).teacher, teacher(X).detach())
    several = read((X, Y), [teacher, torch.relu]).teacher
    assert type(several) is list and torch.equal(several[1], X.relu())
    assert read(Batch(X, Y, teacher="mine"), teacher).teacher == "mine"
    assert read((X, Y), teacher, CrossEntropy()).teacher is None
    assert read((X, Y), teacher, SoftTarget()).teacher is not None


def test_a_functions_random_numbers_are_not_the_students():
    student = FunctionalStudent(Two())
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    read_batch((X, Y), "the batch", as_batch, lambda x: x + torch.randn_like(x), student)
    assert torch.equal(torch.randn(3), expected)


def test_sizes_that_only_the_outputs_tell_are_read():
    batch = Batch((torch.zeros(2, 9), X))
    assert read(batch) is batch
    assert read({"inputs": SimpleNamespace(x=X), "size": 9}).size == 9
    assert "give their" not in error(read, Batch(SimpleNamespace(x=X)))
    assert "Batch(size=...)" in error(read, Batch(SimpleNamespace(x=X)))
    assert "inputs of shape (4, 3) but 3 targets" in error(read, (X, Y[:3]))


def test_what_batch_fn_gives():
    found = error(read, (X, Y), batch_fn=lambda item: item)
    assert "batch_fn must return a metakd.Batch, got tuple" in found
    assert "reading the batch raised IndexError" in error(read, (X, Y), batch_fn=lambda item: item[7])


def test_two_inputs_and_targets_in_a_row_are_told_how():
    found = error(read, (X, X, X[:, :2]))
    assert "reading the batch: the third item from the loader is read as the samples' positions" in found
    assert "Batch(inputs=(item[0], item[1]), targets=item[2])" in found
    batch = read((X, X[:, :2], Y))  # which looks like a label and a position
    found = error(call, Two(), batch.inputs)
    assert "Two raised TypeError: " in found and "'x2'; it was called with torch.float32 (4, 3)." in found
    assert "Batch(inputs=(x1, x2), targets=y) in batch_fn=" in found and "positions in the training set y" in found
    told = read((X, X[:, :2], Y), batch_fn=lambda item: Batch(inputs=(item[0], item[1]), targets=item[2]))
    assert call(Two(), told.inputs).shape == (4, 2)


Graph = namedtuple("Graph", "nodes edges")
CALLS = {
    "entries that it does not know": (
        {"x1": X, "mask": Y},
        r"called with x1=torch\.float32 \(4, 3\), mask=torch\.int64 \(4,\)\. A mapping's entries are keyword "
        r"arguments.*Batch\(inputs=\(mapping,\), \.\.\.\)",
    ),
    "a record": (Graph(X, (Y, None))._replace(edges=None), None),
    "too many": (
        (X, Y, Y),
        r"torch\.int64 \(4,\), torch\.int64 \(4,\)\. The elements of a tuple are positional arguments",
    ),
    "too many in a record": (
        namedtuple("Three", "a b c")(X, Y, Y),
        r"elements of a Three .*Batch\(inputs=\(elements,\)",
    ),
    "an object": (SimpleNamespace(x=X), r"called with SimpleNamespace\. To give it several inputs"),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_that_the_student_does_not_take(case):
    inputs, words = CALLS[case]
    found = error(call, Two(), inputs)
    assert "Two raised TypeError: " in found
    if words is None:  # they fit, and something else went wrong
        assert found.endswith("it was called with torch.float32 (4, 3), None")
    else:
        with pytest.raises(MetaKDError, match=words):
            call(Two(), inputs)


def test_wrappers_do_not_hide_how_many_arguments_there_are():
    for module in (nn.DataParallel(Two()), torch.compile(Two(), backend="eager"), Two().forward, lambda x1, x2: x1):
        assert "Batch(inputs=(x1, x2), targets=y)" in error(call, module, X)
    assert "<lambda> raised TypeError" in error(call, lambda x1, x2: x1, X)


def test_a_packed_sequence_is_one_argument():
    packed = pack_sequence([X, X[:2]])
    lstm = nn.LSTM(3, 2)
    torch.testing.assert_close(call(lstm, packed)[0].data, lstm(packed)[0].data)
    assert read(packed).inputs is packed


def test_the_error_itself_is_quoted_beside_its_likely_cause():
    found = error(call, nn.Linear(3, 2), X.double())
    assert "its parameters are torch.float32, its inputs torch.float64; cast the inputs" in found
    assert "(RuntimeError: " in found
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(nn.Linear(3, 2), X[:, :2])
    with pytest.raises(MetaKDError, match=r"parameters are on cpu, its inputs on meta; move the batch"):
        call(nn.Linear(3, 2), X.to("meta"))


class Failing(nn.Linear):
    def forward(self, x):
        raise RuntimeError("of its own")


def test_no_cause_is_made_up():
    packed = pack_sequence([X, X])
    elsewhere = packed._replace(data=packed.data.to("meta"))  # the lengths stay on the CPU wherever the data is
    for module, inputs in ((Failing(3, 2, device="meta"), elsewhere), (Failing(3, 2).forward, X.double())):
        with pytest.raises(RuntimeError, match="of its own"):
            call(module, inputs)
