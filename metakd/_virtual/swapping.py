"""Other tensors in the places of those that code holds, for a while."""

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
    """A tensor itself, or those in a tuple.

    Examples:
        >>> import torch
        >>> len(list(held((torch.ones(1), ("name", torch.ones(2))))))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for member in value:
            yield from held(member)


def exchanged(value: Any, swaps: Mapping[int, Tensor]) -> Any:
    """An entry in which each tensor whose id is in `swaps` is the one there; the same object where none is.

    Examples:
        >>> import torch
        >>> one, other = torch.zeros(1), torch.ones(1)
        >>> exchanged(("w", one), {id(one): other})
        ('w', tensor([1.]))
    """
    if isinstance(value, Tensor):
        return swaps.get(id(value), value)
    if not isinstance(value, tuple):
        return value
    members = [exchanged(member, swaps) for member in value]
    if all(map(is_, members, value)):
        return value
    return value._make(members) if hasattr(value, "_make") else type(value)(members)


@contextmanager
def swapped(places: Sequence[Place], swaps: Mapping[int, Tensor]) -> Iterator[None]:
    """A block in which other tensors are where those with the ids in `swaps` were; what else changes there, stays.

    Examples:
        >>> import torch
        >>> kept = {"w": torch.ones(1)}
        >>> with swapped(list(Place.all_of(kept, "w", kept["w"])), {id(kept["w"]): torch.zeros(1)}):
        ...     kept["w"]
        tensor([0.])
        >>> kept["w"]
        tensor([1.])
    """
    done: list[tuple[Place, Any]] = []
    try:
        for place in places:
            if id(place.tensor) in swaps:
                done.append((place, exchanged(place.value, swaps)))
                place.container[place.key] = done[-1][1]
        yield
    finally:
        for (container, key, value, _), other in done:
            if not isinstance(container, Mapping) or container.get(key) is other:
                container[key] = value


@contextmanager
def with_parameters(module: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which a module has other parameters; those that are left out stay.

    `torch.func.functional_call` does not put back what has two names.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with with_parameters(layer, {"weight": torch.tensor([[5.0]])}):
        ...     layer(torch.ones(1, 1))
        tensor([[5.]])
    """
    owners = [part._parameters for part in module.modules()]
    places = [Place(owner, name, p, p) for owner in owners for name, p in owner.items() if p is not None]
    with swapped(places, {id(p): params[name] for name, p in module.named_parameters() if name in params}):
        yield
