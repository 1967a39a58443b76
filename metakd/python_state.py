"""What a student's code has left in Python objects: captured, put back, and run again with other tensors in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from metakd.errors import MetaKDError
from metakd.reach import Places

_SMALL = 2**16  # entries of a tensor that is copied although it is no buffer


class Place(NamedTuple):
    """Where a tensor is kept: `container[key] is tensor`."""

    container: Any
    key: Any
    tensor: Tensor


class PythonState:
    """The contents of all places that a pass can reach, and the values of the tensors there that it may write to.

    Contents are kept by identity. Values are kept of buffers and of small tensors without a gradient. Parameters are
    never written to; a larger tensor that is written to and no buffer is an error (`check_written`).

    Args:
        places: where to look.

    Attributes:
        tensors: the places of all tensors.
        values: id of a tensor -> a copy of its value, for those that a pass may write to.

    Examples:
        >>> from metakd.reach import reach
        >>> layer = nn.Linear(1, 1)
        >>> layer.calls = 1
        >>> state = PythonState(reach([layer]))
        >>> layer.calls = 2
        >>> state.put_back()
        >>> layer.calls
        1
    """

    def __init__(self, places: Places) -> None:
        self._mappings = [(m, list(m), list(m.values())) for m in places.mappings]
        self._lists = [(found, list(found)) for found in places.lists]
        self._sets = [(found, set(found)) for found in places.sets]
        self._generators = [_capture(generator) for generator in places.generators]
        self._arrays = [(array, array.copy()) for array in places.arrays if array.size <= _SMALL]
        self.tensors = list(self._tensors())
        buffers = {id(b) for m in places.modules for b in m._buffers.values()}
        writable = {id(t): t for _, _, t in self.tensors if not (t.requires_grad or is_lazy(t))}
        self.values = {i: t.detach().clone() for i, t in writable.items() if i in buffers or t.numel() <= _SMALL}
        self._versions = {i: t._version for i, t in writable.items() if i not in self.values and not t.is_inference()}

    def _tensors(self) -> Iterator[Place]:
        for mapping, keys, values in self._mappings:
            yield from (Place(mapping, k, v) for k, v in zip(keys, values, strict=True) if isinstance(v, Tensor))
        for found, values in self._lists:
            yield from (Place(found, i, v) for i, v in enumerate(values) if isinstance(v, Tensor))

    def put_back(self, swaps: Mapping[int, Tensor] | None = None) -> None:
        """Make the contents what they were; a tensor whose id is in `swaps` becomes the one there.

        Values are not written: see `put_values_back`.
        """
        for mapping, keys, values in self._mappings:
            if not (len(mapping) == len(keys) and all(map(is_, mapping.values(), values)) and list(mapping) == keys):
                _refill(mapping, keys, values)
        for found, values in self._lists:
            if not (len(found) == len(values) and all(map(is_, found, values))):
                found.clear()
                found.extend(values)
        for kept, members in self._sets:
            if kept != members:
                kept.clear()
                kept.update(members)
        for restore in self._generators:
            restore()
        for array, value in self._arrays:
            array[...] = value
        for container, key, tensor in self.tensors if swaps else ():
            if (other := swaps.get(id(tensor))) is not None:  # type: ignore[union-attr]
                container[key] = other

    @torch.no_grad()
    def put_values_back(self) -> None:
        """Write the kept values into their tensors, whatever shape those have now."""
        for _, _, tensor in self.tensors:
            value = self.values.get(id(tensor))
            if value is None:
                continue
            if tensor.shape == value.shape and tensor.dtype == value.dtype:
                tensor.data.copy_(value)  # by .data, for a graph that waits for its backward may hold it
            else:
                tensor.data = value.clone()

    def check_written(self) -> None:
        """See that no tensor was written to whose value is not kept.

        Raises:
            MetaKDError: naming where it is kept.
        """
        for container, key, tensor in self.tensors:
            if id(tensor) in self._versions and self._versions[id(tensor)] != tensor._version:
                raise MetaKDError(
                    f"a forward pass writes to a tensor of {tensor.numel()} numbers that is no buffer "
                    f"({key!r} of {_owner(container)}), so that virtual passes would change it; register it: "
                    "module.register_buffer(name, tensor, persistent=False)"
                )

    def translated(self, names: Mapping[int, Tensor]) -> PythonState:
        """The same state where each tensor whose id is in `names` stands for the one there, and has its value now.

        Other tensors lose tangents and graphs: what one pass leaves behind is a constant to the next.
        """
        new = object.__new__(PythonState)

        def translate(value: Any) -> Any:
            return names.get(id(value), _constant(value)) if isinstance(value, Tensor) else value

        new._mappings = [(m, keys, [translate(v) for v in values]) for m, keys, values in self._mappings]
        new._lists = [(found, [translate(v) for v in values]) for found, values in self._lists]
        new._sets, new._generators, new._arrays = self._sets, self._generators, self._arrays
        new.tensors, new._versions = list(new._tensors()), {}
        pairs = [(old.tensor, kept.tensor) for old, kept in zip(self.tensors, new.tensors, strict=True)]
        changing = [(old, kept) for old, kept in pairs if id(old) in self.values and not kept.requires_grad]
        new.values = {id(kept): _constant(old).clone() for old, kept in changing}
        return new


@contextmanager
def swapped(places: Sequence[Place], swaps: Mapping[int, Tensor]) -> Iterator[None]:
    """A block in which other tensors are where those with the ids in `swaps` were; what else changes there, stays.

    Examples:
        >>> held = {"w": torch.ones(1)}
        >>> with swapped([Place(held, "w", held["w"])], {id(held["w"]): torch.zeros(1)}):
        ...     held["w"]
        tensor([0.])
        >>> held["w"]
        tensor([1.])
    """
    done: list[tuple[Place, Tensor]] = []
    try:
        for place in places:
            if (other := swaps.get(id(place.tensor))) is not None:
                done.append((place, other))
                place.container[place.key] = other
        yield
    finally:
        for (container, key, tensor), other in done:
            if not isinstance(container, Mapping) or container.get(key) is other:
                container[key] = tensor


@contextmanager
def with_parameters(module: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which a module has other parameters; those that are left out stay.

    `torch.func.functional_call` does not put back what has two names.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with with_parameters(layer, {"weight": torch.tensor([[5.0]])}):
        ...     layer(torch.ones(1, 1))
        tensor([[5.]])
    """
    owners = [part._parameters for part in module.modules()]
    places = [Place(owner, name, p) for owner in owners for name, p in owner.items() if p is not None]
    with swapped(places, {id(p): params[name] for name, p in module.named_parameters() if name in params}):
        yield


def _refill(mapping: MutableMapping[Any, Any], keys: list[Any], values: list[Any]) -> None:
    wanted = dict(zip(keys, values, strict=True))
    for key in [key for key in mapping if key not in wanted]:
        del mapping[key]
    for key, value in wanted.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value
    if isinstance(mapping, dict) and list(mapping) != keys:  # in the old order, too
        mapping.clear()
        mapping.update(wanted)


def _capture(generator: Any) -> Callable[[], object]:
    """Gives what puts a generator back to where it is now."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    bits = generator._bit_generator if hasattr(generator, "_bit_generator") else generator.bit_generator
    return partial(setattr, bits, "state", bits.state)


def _constant(tensor: Tensor) -> Tensor:
    """A tensor as the next pass reads it: without tangent or graph; a parameter stays what it is."""
    if tensor.is_leaf and tensor.requires_grad:
        return tensor
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal.detach()


def _owner(container: Any) -> str:
    return "an object" if not isinstance(container, deque | list) else f"a {type(container).__name__}"
