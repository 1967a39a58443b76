"""The contents of Python objects: captured, compared and restored by identity."""

from __future__ import annotations

import random
from collections.abc import Callable, MutableMapping
from functools import partial
from operator import is_
from typing import Any

import torch

from metakd._virtual.reach import Places

SMALL = 2**16  # entries of an array or a tensor that is copied


class Contents:
    """What all places hold, by identity; and the values of generators and small arrays there.

    Attributes:
        places: the places.

    Examples:
        >>> from metakd._virtual.reach import Walk
        >>> log = {"calls": 0}
        >>> contents = Contents(Walk().places([log]))
        >>> log["calls"] = 1
        >>> contents.unchanged()
        False
        >>> contents.put_back()
        >>> log, contents.unchanged()
        ({'calls': 0}, True)
    """

    def __init__(self, places: Places) -> None:
        self.places, self._marks = places, places.marks()
        self._mappings = [(m, list(m), list(m.values())) for m in places.mappings]
        self._lists = [(found, list(found)) for found in places.lists]
        self._sets = [(found, set(found)) for found in places.sets]
        self._long_mappings = [(m, list(m), list(m.values())) for m in places.long if isinstance(m, dict)]
        self._long_lists = [(found, list(found)) for found in places.long if not isinstance(found, dict)]
        self._lengths = [(found, len(found)) for found in places.endless]
        self._hooks = [(found, dict(found)) for found in places.hooks if found]
        self._without_hooks = [found for found in places.hooks if not found]
        self._capture_values()

    def _capture_values(self) -> None:
        self._generators = [_capture(generator) for generator in self.places.generators]
        self._arrays = [(array, array.copy()) for array in self.places.arrays if array.size <= SMALL]

    def unchanged(self) -> bool:
        """Whether all places hold the very objects that they held, so that a walk would lead to the same places."""
        return (
            all(_holds(*kept) for kept in (*self._mappings, *self._long_mappings))
            and all(_lists(*kept) for kept in (*self._lists, *self._long_lists))
            and all(found == members for found, members in self._sets)
            and all(len(found) == length for found, length in self._lengths)
            and all(hooks == registered for hooks, registered in self._hooks)
            and not any(self._without_hooks)
            and self.places.marks() == self._marks
        )

    def put_back(self) -> None:
        """Restore all contents and values."""
        for kept in (*self._mappings, *self._long_mappings):
            if not _holds(*kept):
                _refill(*kept)
        for found, values in (*self._lists, *self._long_lists):
            if not _lists(found, values):
                found.clear()
                found.extend(values)
        for now, members in self._sets:
            if now != members:
                now.clear()
                now.update(members)
        for added, length in self._lengths:
            while len(added) > length:
                added.popitem() if isinstance(added, dict) else added.pop()
        for hooks, registered in self._hooks:
            if hooks != registered:
                _refill(hooks, list(registered), list(registered.values()))
        for hooks in self._without_hooks:
            if hooks:
                hooks.clear()
        for restore in self._generators:
            restore()
        for array, value in self._arrays:
            array[...] = value


def _holds(mapping: MutableMapping[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    """Whether a mapping has these very keys and values in order; `==` would compare tensors by entries."""
    return len(mapping) == len(keys) and all(map(is_, mapping.values(), values)) and all(map(is_, mapping, keys))


def _lists(found: Any, values: list[Any]) -> bool:
    """Whether a list or deque holds these very values."""
    return len(found) == len(values) and all(map(is_, found, values))


def _refill(mapping: MutableMapping[Any, Any], keys: list[Any], values: list[Any]) -> None:
    wanted = dict(zip(keys, values, strict=True))
    for key in [key for key in mapping if key not in wanted]:
        del mapping[key]
    for key, value in wanted.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value
    if isinstance(mapping, dict) and not all(map(is_, mapping, keys)):  # restore the order
        mapping.clear()
        mapping.update(wanted)


def _capture(generator: Any) -> Callable[[], object]:
    """Return a function that restores a generator to its present state."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    bits = generator._bit_generator if hasattr(generator, "_bit_generator") else generator.bit_generator
    return partial(setattr, bits, "state", bits.state)
