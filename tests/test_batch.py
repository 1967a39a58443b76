"""How a loader's item becomes a `Batch`, and what is said about items that cannot."""

from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from metakd import Batch, MetaKDError
from metakd._basics.columns import RESERVED
from metakd.batch import arguments, as_batch, batch_size, check_size, detached_copy

X, Y, INDEX, TEACHER = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.ones(4, 5)


def same(batch, inputs, targets=None, teacher=None, index=None):
    assert type(batch) is Batch
    assert batch.targets is targets and batch.teacher is teacher and batch.index is index
    if isinstance(inputs, dict):
        assert batch.inputs == inputs
    else:
        assert batch.inputs is inputs


def test_a_batch_is_itself():
    batch = Batch(X, Y, TEACHER, INDEX)
    assert as_batch(batch) is batch
    assert Batch._fields == ("inputs", "targets", "teacher", "index", "size", "columns")


SOURCE = {"source": torch.tensor([7, 0, 3, 3])}


@pytest.mark.parametrize(
    ("item", "index"),
    [
        ((X, Y, SOURCE), None),
        ([X, Y, INDEX, SOURCE], INDEX),
        ((X, Y, None, SOURCE), None),
        ({"inputs": X, "targets": Y, "columns": SOURCE}, None),
        ({"x": X, "labels": Y, "index": INDEX, "columns": SOURCE}, INDEX),
    ],
)
def test_items_with_named_columns(item, index):
    batch = as_batch(item)
    assert batch.columns is SOURCE and batch.targets is Y and batch.index is index
    check_size(batch, "the batch")
    copied = detached_copy(batch).columns["source"]
    assert torch.equal(copied, SOURCE["source"]) and copied is not SOURCE["source"]


def test_a_loader_collates_columns():
    data = [(X[i], Y[i], i, {"source": i % 2}) for i in range(4)]
    batch = as_batch(next(iter(DataLoader(data, batch_size=4))))
    assert batch.columns["source"].tolist() == [0, 1, 0, 1] and batch.index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([INDEX], r"the columns of the meta batch are \(torch.int64 \(4,\)\); pass a mapping"),
        ({"source": INDEX[:3]}, r"'source' of the meta batch has 3 values for 4 samples"),
        ({"source": INDEX[:, None]}, r"'source' .*integers of shape \(B,\).* torch.int64 \(4, 1\)"),
        ({"source": X[:, 0]}, r"'source' .*torch.float32 \(4,\)"),
        ({"source": Y.bool()}, r"'source' .*torch.bool \(4,\)"),
        ({"source": [0, 1, 2, 3]}, r"'source' .*\(int, int, int, int\)"),
        ({"index": INDEX}, r"a column named 'index'.*string other than inputs, targets"),
        ({"weight": INDEX}, r"a column named 'weight'"),
        ({3: INDEX}, r"a column named 3"),
    ],
)
def test_columns_that_do_not_fit(columns, message):
    with pytest.raises(MetaKDError, match=message):
        check_size(Batch(X, Y, columns=columns), "the meta batch")


def test_columns_of_a_batch_whose_size_is_open_have_one_length():
    with pytest.raises(MetaKDError, match=r"'b' of the batch has 3 values for 4 samples"):
        check_size(Batch((torch.zeros(2, 9), X), columns={"a": INDEX, "b": INDEX[:3]}), "the batch")


def test_no_column_is_named_like_a_field():
    assert set(Batch._fields) < set(RESERVED)


def test_tensors_tuples_and_lists():
    same(as_batch(X), X)
    for kind in (tuple, list):
        same(as_batch(kind([X, Y])), X, Y)
        same(as_batch(kind([X, Y, INDEX])), X, Y, index=INDEX)
        same(as_batch(kind([{"a": X}, Y])), {"a": X}, Y)
    pair = namedtuple("Pair", "image label")(X, Y)
    same(as_batch(pair), X, Y)
    same(as_batch((X, Y, None)), X, Y)
    packed = pack_sequence([X, X[:2]])
    same(as_batch(packed), packed)


def test_mappings_with_inputs_have_the_fields_of_a_batch():
    same(as_batch({"inputs": X}), X)
    same(as_batch({"targets": Y, "inputs": X, "teacher": TEACHER, "index": INDEX}), X, Y, TEACHER, INDEX)
    assert as_batch({"inputs": X, "size": 7}).size == 7
    same(as_batch(OrderedDict(inputs=(X, X), targets=Y)).__class__(X, Y), X, Y)


@pytest.mark.parametrize("key", ["targets", "labels", "label", "target", "y"])
def test_mappings_without_inputs_are_keyword_arguments(key):
    item = {"input_ids": X, "attention_mask": Y, key: INDEX, "index": Y, "teacher": TEACHER}
    before = dict(item)
    same(as_batch(item), {"input_ids": X, "attention_mask": Y}, INDEX, TEACHER, Y)
    assert item == before
    same(as_batch({"input_ids": X}), {"input_ids": X})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((X,), r"type tuple of length 1 .*batch_fn="),
        (
            (X, Y, INDEX, TEACHER),
            r"tuple of length 4 .*: item\[0\] torch.float32 \(4, 3\), item\[1\] torch.int64 \(4,\), .*batch_fn=lambda",
        ),
        ([X] * 9, r"type list of length 9 .*item\[5\] torch.float32 \(4, 3\), \.\.\.;"),
        (
            (X, X, X),
            r"third item.*torch.float32 \(4, 3\).*batch_fn=.*inputs=\(item\[0\], item\[1\]\), targets=item\[2\]",
        ),
        ((X, X, Y.bool()), r"third item.*torch.bool \(4,\).*Batch\(inputs="),
        ((X, X, Y[:, None]), r"third item.*torch.int64 \(4, 1\).*Batch\(inputs="),
        ([X, X, [0, 1, 2, 3]], r"third item.*\(int, int, int, int\).*Batch\(inputs="),
        ([], r"type list of length 0 "),
        (None, r"type NoneType is not understood"),
        ("text", r"type str is not understood"),
        ({"labels": Y}, r"holds no inputs.*'inputs'"),
        ({}, r"holds no inputs"),
        ({"inputs": X, "labels": Y}, r"\['labels'\] besides 'inputs'.*'targets'.*batch_fn="),
    ],
)
def test_what_is_not_understood_is_named(item, message):
    with pytest.raises(MetaKDError, match=message):
        as_batch(item)


def test_arguments_of_the_student():
    packed = pack_sequence([X, X[:2]])
    assert arguments(packed) == ((packed,), {})
    assert arguments((packed, X))[0][0] is packed
    assert arguments(UserDict(x=X)) == ((), {"x": X})
    graph = SimpleNamespace(x=X)
    assert arguments(graph) == ((graph,), {})


Record = namedtuple("Record", "labels lengths")


@given(st.integers(1, 6), st.integers(0, 3))
def test_the_batch_size_is_that_of_the_targets_or_else_of_the_inputs(size, rank):
    x, y = torch.zeros(size, *[2] * rank), torch.zeros(size)
    for batch in (
        Batch(x),
        Batch(x, y),
        Batch((x, x), (y, y)),
        Batch({"a": x}),
        Batch([torch.zeros(1), x], y),
    ):
        assert batch_size(batch, "the batch") == size


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(torch.zeros(0, 3)), r"the meta batch is empty \(batch size 0\)"),
        (Batch(torch.zeros(4, 3), torch.zeros(0)), r"the meta batch is empty"),
        (Batch(torch.zeros(4, 3), Y[:3]), r"the meta batch has inputs of shape \(4, 3\) but 3 targets"),
        (Batch(torch.tensor(1.0), Y), r"inputs of shape \(\) but 4 targets"),
        (Batch(torch.tensor(1.0)), r"no tensor with a batch dimension"),
        (Batch(X, torch.tensor(1.0)), r"no tensor with a batch dimension"),
        (Batch(None), r"no tensor with a batch dimension"),
        (Batch({"text": "words"}, ["a", "b"]), r"no tensor with a batch dimension.*Batch\(size=\.\.\.\)"),
        (Batch(SimpleNamespace(x=X)), r"cannot tell how many samples the meta batch has"),
        (Batch(torch.zeros(7, 4, 3), Y), r"inputs of shape \(7, 4, 3\) but 4 targets.*Batch\(size=\.\.\.\)"),
        (Batch(X, [{}, {}, {}]), r"inputs of shape \(4, 3\) but 3 targets"),
        (Batch(pack_sequence([X, X]), Y), r"inputs of 2 samples but 4 targets"),
        (Batch(torch.zeros(5, 3), (torch.zeros(9), Y)), r"shape \(5, 3\) but 2, 9 or 4 targets.*Batch\(size="),
        (
            Batch(SimpleNamespace(), (torch.zeros(9), Y)),
            r"by batch.targets 2, 9 or 4; give their number as Batch\(size=",
        ),
        (Batch((torch.zeros(2, 9), X)), r"by batch.inputs 2 or 4; give their number as Batch\(size="),
        (
            Batch((torch.zeros(5), X[:3]), {"a": Y, "b": torch.zeros(9)}),
            r"by batch.targets 4 or 9, by batch.inputs 5 or 3",
        ),
        (Batch(SimpleNamespace(), Record(torch.zeros(9), Y)), r"by batch.targets 9 or 4; give"),
        (Batch(SimpleNamespace(), {"ctc": (torch.zeros(9), Y)}), r"by batch.targets 2, 9 or 4; give"),
        (Batch(X, Y, size=0), r"the size of the meta batch is 0, but must be an integer of at least 1"),
        (Batch(X, Y, size=4.0), r"the meta batch is 4.0, but must be"),
        (Batch(X, Y, size=True), r"the meta batch is True, but must be"),
    ],
)
def test_batches_without_a_size_are_an_error(batch, message):
    with pytest.raises(MetaKDError, match=message):
        batch_size(batch, "the meta batch")


BOXES = [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in (2, 5, 1)]
LINES = [torch.zeros(7), torch.zeros(3), torch.zeros(5)]
PACKED = pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(1, 2)])
THREE = {
    "boxes": Batch(([torch.zeros(3, 8, 8)] * 3,), BOXES),
    "boxes in a tuple": Batch((LINES,), tuple(BOXES)),
    "boxes, stacked images": Batch(torch.zeros(3, 3, 8, 8), BOXES),
    "as many boxes each": Batch(torch.zeros(3, 3, 8, 8), [{"boxes": torch.zeros(2, 4)}] * 3),
    "lines of different lengths": Batch((LINES,), LINES),
    "lines of one length": Batch(torch.zeros(3, 5), [torch.zeros(4)] * 3),
    "lines and nothing that helps": Batch(SimpleNamespace(x=X), LINES),
    "single numbers": Batch(SimpleNamespace(x=X), [torch.tensor(1.0)] * 3),
    "several targets": Batch(torch.zeros(3, 5), (torch.zeros(3), torch.zeros(3, 2))),
    "several targets of a graph": Batch(SimpleNamespace(x=X), (torch.zeros(3), torch.zeros(3, 2))),
    "labels in a row and their lengths": Batch(torch.zeros(3, 9, 2), (torch.zeros(11), torch.tensor([3, 4, 4]))),
    "the same in a list": Batch(torch.zeros(3, 9, 2), [torch.zeros(11), torch.tensor([3, 4, 4])]),
    "the same by name": Batch(torch.zeros(3, 9, 2), {"labels": torch.zeros(11), "lengths": torch.tensor([3, 4, 4])}),
    "the same as a record": Batch((torch.zeros(3, 9, 2),), Record(torch.zeros(2), torch.tensor([3, 4, 4]))),
    "two readings of one": Batch(
        SimpleNamespace(), {"ctc": (torch.zeros(11), torch.zeros(3)), "y": [torch.zeros(3), torch.zeros(3)]}
    ),
    "labels and lengths": Batch(torch.zeros(3, 9, 2), (torch.zeros(3, 6), torch.tensor([3, 4, 4]))),
    "packed": Batch(PACKED),
    "packed with labels": Batch(PACKED, torch.zeros(3)),
    "packed on both sides": Batch(PACKED, PACKED),
    "packed targets": Batch(torch.zeros(3, 5), PACKED),
    "packed and a state": Batch((PACKED, torch.zeros(1, 3, 4)), torch.zeros(3)),
    "edges": Batch((torch.zeros(3, 5), torch.zeros(2, 9)), torch.zeros(3)),
    "a graph with labels": Batch(SimpleNamespace(x=X), torch.zeros(3)),
    "time first": Batch(torch.zeros(9, 3, 2), torch.zeros(9, 3), size=3),
    "a graph": Batch(SimpleNamespace(x=X), size=3),
    "an integer of another kind": Batch(SimpleNamespace(x=X), size=torch.tensor(3)),
    "a table beside": Batch({"x": torch.zeros(3, 2), "table": torch.zeros(9)}, torch.zeros(3)),
}


@pytest.mark.parametrize("case", THREE)
def test_three_samples(case):
    assert batch_size(THREE[case], "the batch") == 3
    check_size(THREE[case], "the batch")


def test_the_outputs_tell_what_the_batch_leaves_open():
    for batch in (Batch((torch.zeros(2, 9), X)), Batch(SimpleNamespace(), (torch.zeros(9), Y))):
        check_size(batch, "the batch")
        assert batch_size(batch, "the batch", torch.zeros(4, 2)) == 4


def test_what_contradicts_itself_is_refused_before_there_are_outputs():
    for batch in (Batch(torch.zeros(5, 3), (torch.zeros(9), Y)), Batch(SimpleNamespace()), Batch(X, Y[:2])):
        with pytest.raises(MetaKDError, match=r"Batch\(size=\.\.\.\)"):
            check_size(batch, "the batch")
    with pytest.raises(MetaKDError, match="but 2, 9 or 4 targets"):
        batch_size(Batch(torch.zeros(5, 3), (torch.zeros(9), Y)), "the batch", torch.zeros(9, 2))
