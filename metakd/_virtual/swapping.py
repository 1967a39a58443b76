"""Temporarily replaces tensors wherever code holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """Where a tensor is kept, alone or in a tuple: `container[key] is value`."""

    container: Any
    key: Any
    value: Any
    tensor: Tensor

    @classmethod
    def all_of(cls, container: Any, key: Any, value: Any) -> Iterator[Place]:
        """The places of the tensors in an entry."""
        return (cls(container, key, value, tensor) for tensor in held(value))


def held(value: Any) -> Iterator[Tensor]:
    """The tensor itself, or the tensors in a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for member in value:
            yield from held(member)


def substituted(value: Any, swaps: Mapping[int, Tensor]) -> Any:
    """An entry with the tensors in `swaps` (by id) replaced; the same object if there are none."""
    if isinstance(value, Tensor):
        return swaps.get(id(value), value)
    if not isinstance(value, tuple):
        return value
    members = [substituted(member, swaps) for member in value]
    if all(map(is_, members, value)):
        return value
    return value._make(members) if hasattr(value, "_make") else type(value)(members)


@contextmanager
def swap_in(places: Sequence[Place], swaps: Mapping[int, Tensor]) -> Iterator[None]:
    """A block with the tensors in `swaps` (by id) replaced; entries that the block itself changes stay changed."""
    done: list[tuple[Place, Any]] = []
    try:
        for place in places if swaps else ():
            if id(place.tensor) in swaps:
                done.append((place, substituted(place.value, swaps)))
                place.container[place.key] = done[-1][1]
        yield
    finally:
        for (container, key, value, _), other in done:
            if not isinstance(container, Mapping) or container.get(key) is other:
                container[key] = value


@contextmanager
def with_parameters(module: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """A block with other parameters in a module. `functional_call` would not restore tied parameters."""
    owners = [part._parameters for part in module.modules()]
    places = [Place(owner, name, p, p) for owner in owners for name, p in owner.items() if p is not None]
    with swap_in(places, {id(p): params[name] for name, p in module.named_parameters() if name in params}):
        yield
