"""Nests of tensors: each keeps its type, and what holds no data is passed on whole."""

import logging
import threading
import types
import weakref
from argparse import Namespace
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, namedtuple
from dataclasses import dataclass, field, make_dataclass
from types import MappingProxyType, SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from metakd import Batch, MetaKDError
from metakd._basics.nest import map_tensors, tensors

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 2, 0])


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


def double(value):
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)


class Plain:
    """A graph of a user's own: tensors in attributes, in nests of these, and beside them."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("__hidden", "empty", "x")

    def __init__(self, x):
        self.x, self.__hidden = x, [x, "text"]

    def hidden(self):
        return self.__hidden[0]


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    twice: torch.Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", 2 * self.x)


class Pair(tuple):
    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


class Checked(list):
    """A list with an attribute that refuses to be made or filled by others."""

    def __init__(self, x, note):
        super().__init__([x])
        self.note = note

    def __setitem__(self, position, value):
        raise TypeError("constant")


class Mirror(dict):
    """Items are attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Dotted(dict):
    __getattr__ = dict.__getitem__  # which answers every unknown name with a KeyError


class Wrapping(UserDict):
    def __init__(self, required):
        super().__init__(x=required)


def grown_up():
    """A class that is made at run time, in the name of Python's own modules."""
    made = make_dataclass("Made", ["x"])
    made.__module__ = "types"
    return made(X)


KEPT = {
    "ordered": (OrderedDict(x=X), lambda v: v["x"]),
    "default": (defaultdict(list, x=X), lambda v: v["x"]),
    "a dict of attributes": (Mirror(x=X), lambda v: v.x),
    "a dict with any attribute": (Dotted(x=X), lambda v: v.x),
    "user dict": (Wrapping(X), lambda v: v["x"]),
    "user list": (UserList([X]), lambda v: v[0]),
    "chain": (ChainMap({"x": X}, {"y": Y}), lambda v: v["x"]),
    "proxy": (MappingProxyType({"x": X}), lambda v: v["x"]),
    "record": (namedtuple("Record", "x y")(X, Y), lambda v: v.x),
    "tuple": (Pair(X, Y), lambda v: v[0]),
    "return type": (X.max(dim=1), lambda v: v.values),
    "packed": (pack_sequence([X, X[:2]]), lambda v: v.data),
    "list": (Checked(X, X), lambda v: v[0]),
    "a list's attribute": (Checked(Y, X), lambda v: v.note),
    "dataclass": (Frozen(X), lambda v: v.twice),
    "slots": (Slotted(X), lambda v: v.x),
    "hidden slots": (Slotted(X), lambda v: v.hidden()),
    "namespace": (SimpleNamespace(a={"x": [X]}), lambda v: v.a["x"][0]),
    "arguments": (Namespace(x=X), lambda v: v.x),
    "object": (Plain(inner=Plain(x=X), text="text"), lambda v: v.inner.x),
    "a class made at run time": (grown_up(), lambda v: v.x),
    "distribution": (torch.distributions.Normal(X, X + 1), lambda v: v.loc),
}


@pytest.mark.parametrize("kind", KEPT)
def test_mapping_keeps_the_type(kind):
    keeps_its_type(*KEPT[kind])


def keeps_its_type(value, read):
    assert read(value).dtype == torch.float32
    found = double(value)
    assert type(found) is type(value) and found is not value
    assert read(found).dtype == torch.float64 and read(value).dtype == torch.float32
    torch.testing.assert_close(read(found).float(), read(value))
    met = []
    map_tensors(met.append, value)
    assert [id(t) for t in met] == [id(t) for t in tensors(value)] and met


def test_hugging_faces_types():
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=X, hidden_states=(X, Y))
    keeps_its_type(output, lambda v: v.logits)
    keeps_its_type(output, lambda v: v.hidden_states[0])
    keeps_its_type(transformers.BatchEncoding({"x": X}), lambda v: v.x)
    found = double(output)
    assert found.logits is found["logits"] and found.loss is None and found.to_tuple()[1] is found["hidden_states"]
    assert [id(t) for t in tensors(output)] == [id(X), id(X), id(Y)]


def test_what_mirrors_an_item_goes_on_to_mirror_it():
    found = double(Mirror(logits=X))
    assert found.logits is found["logits"] and len(tensors(Mirror(logits=X))) == 1
    assert double(defaultdict(list, x=X))["new"] == []
    assert not hasattr(double(Slotted(X)), "empty")


def test_complex_tensors_are_visited():
    z = torch.ones(2, dtype=torch.complex64)
    assert [t.dtype for t in tensors([z, Plain(z=z)])] == [torch.complex64] * 2
    assert map_tensors(torch.conj, Plain(z=z)).z.is_conj()


LOCK = threading.Lock()
WHOLE = {
    "module": nn.Linear(1, 1),
    "type": nn.Linear,
    "function": lambda x=X: x,
    "optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1),
    "generator": torch.Generator(),
    "iterator": iter([X]),
    "dataset": torch.utils.data.TensorDataset(X),
    "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X)),
    "python module": types,
    "logger": logging.getLogger("metakd.test"),
    "lock": LOCK,
    "object without tensors": Plain(text="text", lock=LOCK, network=nn.Linear(1, 1), parts=[1, {2: None}]),
    "text": "text",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_holds_no_data_is_passed_on_as_it_is(kind):
    whole = WHOLE[kind]
    assert tensors(whole) == [] and double(whole) is whole
    holder = Plain(x=X, whole=whole)
    assert double(holder).whole is whole and len(tensors(holder)) == 1


def test_objects_that_lead_back_to_themselves():
    parent, child = Plain(x=X), Plain(y=X)
    parent.child, parent.itself, parent.both, child.parent = child, parent, [child, child], weakref.ref(parent)
    found = double([parent, parent])
    assert found[0] is found[1] and found[0].itself is found[0] and found[0].both == [found[0].child] * 2
    assert found[0].child.parent() is found[0] and child.parent() is parent
    assert [t.dtype for t in tensors(found)] == [torch.float64] * 2
    loop = [X]
    pair = (X, loop)
    loop.append(pair)
    met = []
    map_tensors(lambda t: met.append(t) or t, pair)
    assert len(met) == len(tensors(pair))
    loop, knot = [X], {}
    loop.append(loop)
    knot["self"], knot["loop"] = knot, (loop, loop)
    found = double(knot)
    assert found["self"] is found and len(tensors(knot)) == len(tensors(found)) == 2
    assert all(part[1] is part and part[0].dtype == torch.float64 for part in found["loop"])


def test_a_container_counts_at_each_of_its_places():
    part = [X]
    found = double([part, {"again": part}])
    assert len(tensors([part, {"again": part}])) == 2
    assert found[0] is not found[1]["again"] and found[0][0] is not found[1]["again"][0]


class Original:
    def __init__(self, x):
        self.x = x


def test_the_originals_stay_as_they_are():
    """Also where a class shares the attributes of all its objects."""
    value = Plain(x=X)
    shared = Original(X)
    shared.__dict__ = value.__dict__
    found = double([value, shared])
    assert found[0].x.dtype == found[1].x.dtype == torch.float64
    assert value.x is X and shared.x is X


class Foreign(BaseException):
    """Of a type that only its own code can make."""

    def __reduce__(self):
        raise TypeError("not to be copied")


def test_an_object_that_cannot_be_copied():
    value = Foreign("text")
    assert double(value) is value
    value.x = X
    with pytest.raises(MetaKDError, match=r"type Foreign holds tensors.*cannot be copied: .*not to be copied; put"):
        double(value)
    assert tensors(value) == [X]
