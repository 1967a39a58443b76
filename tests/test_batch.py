"""How a loader's item becomes a `Batch`, and what is said about items that cannot."""

from collections import OrderedDict, namedtuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd import Batch, MetaKDError
from metakd.batch import as_batch, batch_size, map_tensors, tensors

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
    assert Batch._fields == ("inputs", "targets", "teacher", "index")


def test_tensors_tuples_and_lists():
    same(as_batch(X), X)
    for kind in (tuple, list):
        same(as_batch(kind([X, Y])), X, Y)
        same(as_batch(kind([X, Y, INDEX])), X, Y, index=INDEX)
        same(as_batch(kind([{"a": X}, Y])), {"a": X}, Y)
    pair = namedtuple("Pair", "image label")(X, Y)
    same(as_batch(pair), X, Y)


def test_mappings_with_inputs_have_the_fields_of_a_batch():
    same(as_batch({"inputs": X}), X)
    same(as_batch({"targets": Y, "inputs": X, "teacher": TEACHER, "index": INDEX}), X, Y, TEACHER, INDEX)
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
        ((X, Y, INDEX, TEACHER), r"type tuple of length 4 .*batch_fn="),
        ([], r"type list of length 0 "),
        (None, r"type NoneType is not understood"),
        ("text", r"type str is not understood"),
        ({"labels": Y}, r"holds no inputs.*'inputs'"),
        ({}, r"holds no inputs"),
        ({"inputs": X, "labels": Y}, r"\['labels'\] beside 'inputs'.*'targets'.*batch_fn="),
    ],
)
def test_what_is_not_understood_is_named(item, message):
    with pytest.raises(MetaKDError, match=message):
        as_batch(item)


LEAVES = st.one_of(
    st.none(), st.integers(), st.text(max_size=2), st.integers(0, 3).map(lambda n: torch.full((n,), 1.0))
)
NESTS = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), part, max_size=3),
        st.tuples(part, part).map(lambda pair: Batch(*pair)),
    ),
    max_leaves=8,
)


def shape_of(nest):
    """A nest with its tensors' values in place of the tensors."""
    if isinstance(nest, torch.Tensor):
        return ("tensor", nest.tolist())
    if isinstance(nest, dict):
        return {key: shape_of(part) for key, part in nest.items()}
    if isinstance(nest, tuple | list):
        return type(nest).__name__, [shape_of(part) for part in nest]
    return nest


@given(NESTS)
def test_mapping_over_a_nest_keeps_its_form(nest):
    before = shape_of(nest)
    assert shape_of(map_tensors(lambda t: t, nest)) == before
    doubled = map_tensors(lambda t: 2 * t, nest)
    assert shape_of(map_tensors(lambda t: t / 2, doubled)) == before
    assert shape_of(nest) == before
    assert [t.tolist() for t in tensors(doubled)] == [(2 * t).tolist() for t in tensors(nest)]


@given(NESTS)
def test_tensors_are_those_that_mapping_meets_in_its_order(nest):
    met = []
    map_tensors(met.append, nest)
    assert [id(t) for t in met] == [id(t) for t in tensors(nest)]


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
        (Batch({"text": "words"}, ["a", "b"]), r"no tensor with a batch dimension"),
    ],
)
def test_batches_without_a_size_are_an_error(batch, message):
    with pytest.raises(MetaKDError, match=message):
        batch_size(batch, "the meta batch")
