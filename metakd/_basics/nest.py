"""Find and replace the tensors in nests: containers and objects that loaders, students and optimizers pass around."""

import copy
import sys
import weakref
from argparse import Namespace
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from types import MappingProxyType, MemberDescriptorType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from metakd.errors import MetaKDError

# The walk does not enter these: the tensors inside are not data of a batch.
_WHOLE = (nn.Module, type, torch.optim.Optimizer, torch.Generator, Dataset, DataLoader, Sampler, Iterator)
_CONSTANT, _FILLED = (tuple, MappingProxyType), (list, dict)
_BAGS = (SimpleNamespace, Namespace, UserDict, UserList, ChainMap)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of containers and objects with attributes, in the order of `map_tensors`."""
    found: list[Tensor] = []
    _gather(value, found, set())
    return found


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for inference tensors, which have no count and cannot be written to."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def versions_of(value: Any) -> list[int]:
    """`version_of` of every tensor in a nest: tells whether any was written to."""
    return [version_of(t) for t in tensors(value)]


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; those that torch cannot compare (sparse, nested) count as same."""
    try:
        return torch.equal(one, other)
    except (NotImplementedError, RuntimeError):
        return True


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Copy a nest with `function` applied to every tensor; container types and all other leaves stay.

    The walk enters tuples, lists, mappings, their subclasses, and objects with attributes. Objects that hold tensors
    are copied without running their own code. Modules, optimizers, datasets and the like (`_WHOLE`) are not entered.

    Raises:
        MetaKDError: an object that holds tensors cannot be copied.
    """
    return _mapped(value, function, {})


def _gather(value: Any, found: list[Tensor], met: set[int]) -> None:
    """Append the value's tensors to `found`. `met` has the ids of objects already visited or now being visited."""
    if isinstance(value, Tensor):
        found.append(value)
    elif _has_parts(_kind(value)) and id(value) not in met:
        if not isinstance(value, _CONSTANT):
            met.add(id(value))
        parts = _items(value)
        if attributes := _attributes(value):
            known = {id(item) for item in parts}
            parts += [part for _, part in attributes if id(part) not in known]
        for part in parts:
            _gather(part, found, met)
        if isinstance(value, _FILLED):  # a list counts once for each place that holds it, other objects once
            met.discard(id(value))


def _mapped(value: Any, function: Callable[[Tensor], Any], copies: dict[int, Any]) -> Any:
    """Map one value; `copies` maps the ids of originals to their copies."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is weakref.ref:  # a copied child refers back to the copied parent
        seen = copies.get(id(value()))
        return value if seen is None else weakref.ref(seen)
    if not _has_parts(_kind(value)):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if not isinstance(value, _FILLED + _CONSTANT) and not tensors(value):
        return value
    if not isinstance(value, _CONSTANT):
        copies[id(value)] = _blank(value)
    items = _items(value)
    parts = [_mapped(part, function, copies) for part in items]
    if isinstance(value, _CONSTANT):
        if all(new is old for new, old in zip(parts, items, strict=True)) and not _attributes(value):
            return value
        new = _constant(value, parts)
    else:
        new = copies[id(value)]
        _fill(new, value, parts)
    # Outputs of Hugging Face's models hold each entry as an item and as an attribute: both get the same copy.
    mirrored = {id(item): part for item, part in zip(items, parts, strict=True)}
    for place, part in _attributes(value):
        changed = mirrored[id(part)] if id(part) in mirrored else _mapped(part, function, copies)
        if isinstance(place, str):
            new.__dict__[place] = changed
        else:
            place.__set__(new, changed)
    if isinstance(value, _FILLED):
        del copies[id(value)]
    return new


def _kind(value: Any) -> Any:
    return type(value)  # typed Any, as mypy does not take a class for hashable


@lru_cache(maxsize=1024)
def _has_parts(kind: type) -> bool:
    """Whether the walk enters objects of this type."""
    if issubclass(kind, _CONSTANT + _FILLED + _BAGS):
        return not issubclass(kind, _WHOLE)
    # Loggers, threads and other objects of Python's own hold no data of a batch, but lead anywhere.
    return not issubclass(kind, _WHOLE) and not all(map(_is_pythons_own, kind.__mro__))


def _is_pythons_own(kind: type) -> bool:
    # A class made at run time may claim to be from `abc` or `types`, so look its name up in that module.
    listed = str(kind.__module__).partition(".")[0] in sys.stdlib_module_names
    made = bool(kind.__flags__ & 1 << 9)  # Py_TPFLAGS_HEAPTYPE
    return listed and (not made or getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind)


def _items(value: Any) -> list[Any]:
    """The entries of a container, read by its base class: a subclass may define other iteration."""
    if isinstance(value, dict):
        return list(dict.values(value))
    if isinstance(value, MappingProxyType):
        return list(value.values())
    base = next((base for base in (tuple, list) if isinstance(value, base)), None)
    return [] if base is None else list(base.__iter__(value))


def _attributes(value: Any) -> list[tuple[Any, Any]]:
    """An object's attributes with their places: names in `__dict__`, or descriptors of slots."""
    if _without_attributes(_kind(value)):
        return []
    found: list[tuple[Any, Any]] = [*getattr(value, "__dict__", {}).items()]
    for slot in _slots(_kind(value)):
        with suppress(AttributeError):  # the slot has no value
            found.append((slot, slot.__get__(value)))
    return found


@lru_cache(maxsize=1024)
def _without_attributes(kind: type) -> bool:
    """Whether objects of this type are bare containers, such as lists and named tuples."""
    return kind.__dictoffset__ == 0 and not _slots(kind)


@lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    having = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls) or cls is defaultdict]
    return tuple(slot for own in having for slot in own.values() if isinstance(slot, MemberDescriptorType))


def _constant(value: Any, parts: list[Any]) -> Any:
    """An immutable container of the same type with other entries."""
    if isinstance(value, MappingProxyType):
        return MappingProxyType(dict(zip(value, parts, strict=True)))
    try:
        return tuple.__new__(type(value), parts)
    except TypeError:  # torch.return_types
        return type(value)(parts)


def _fill(new: Any, value: Any, parts: list[Any]) -> None:
    if isinstance(value, list):
        list.extend(new, parts)
    elif isinstance(value, dict):
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        for key, part in zip(dict.keys(value), parts, strict=True):
            base.__setitem__(new, key, part)


def _blank(value: Any) -> Any:
    """A new, empty object of the same type."""
    kind, why = _kind(value), "copy.copy gave the object itself or another type"
    base: Any = next(base for base in (OrderedDict, defaultdict, dict, list, object) if isinstance(value, base))
    with suppress(TypeError):  # types written in C may refuse
        return base.__new__(kind)
    try:
        new = copy.copy(value)
        if type(new) is kind and new is not value:
            return new
    except Exception as error:
        why = f"copy.copy raised {type(error).__name__}: {error}"
    raise MetaKDError(
        f"an object of type {kind.__name__} holds tensors that must be cast or detached, but it cannot be copied: "
        f"{why}; put the tensors in a mapping or a tuple"
    )
