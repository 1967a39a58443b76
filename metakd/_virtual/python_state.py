"""The state that a student's code keeps in Python objects: captured, restored, or restored with other tensors in it."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Set
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from metakd._basics.together import clones, copy_into
from metakd._virtual.contents import SMALL, Contents
from metakd._virtual.iterators import RefusingIterator, is_iterator
from metakd._virtual.reach import Places
from metakd._virtual.shards import is_a
from metakd._virtual.swapping import Place, substituted
from metakd.errors import MetaKDError

_NO_TENSORS: frozenset[Any] = frozenset({bool, int, float, str, type(None), dict, OrderedDict, list, set})


class PythonState(Contents):
    """The contents of all places that a pass can reach, and the values of the tensors there that it may write to.

    Contents are kept by identity. Values are kept of buffers and of small tensors without gradients. A pass must not
    write to parameters, nor to larger tensors that are no buffers (`check_written`).

    Attributes:
        large_arrays: NumPy arrays too large to keep a copy.
        tensors: the places of all tensors.
        values: id of a tensor -> a copy of its value.
    """

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self.large_arrays = [array for array in places.arrays if array.size > SMALL]
        self.tensors = list(self._tensors())
        self._capture_tensors()

    def _capture_tensors(self) -> None:
        self._gradients = [(t, t.grad) for *_, t in self.tensors if t.retains_grad]
        buffers = {id(b) for m in self.places.modules for b in m._buffers.values()}
        writable = {id(t): t for *_, t in self.tensors if not (t.requires_grad or is_lazy(t) or is_a(t, "DTensor"))}
        kept = {i: t for i, t in writable.items() if i in buffers or t.numel() <= SMALL}
        self.values = dict(zip(kept, clones(list(kept.values())), strict=True))
        self._versions = {i: t._version for i, t in writable.items() if i not in self.values and not t.is_inference()}

    def now(self) -> PythonState:
        """The state at present, if the contents are `unchanged`: the values alone are captured anew."""
        new = copy.copy(self)
        new._capture_values()
        new._capture_tensors()
        return new

    def _entries(self, skipped: Set[Any] = frozenset()) -> Iterator[tuple[Any, Any, Any]]:
        """All entries of mappings and lists, but of mappings whose values are of `skipped` types alone."""
        for mapping, keys, values in self._mappings:
            if not skipped >= set(map(type, values)):
                yield from zip(repeat(mapping), keys, values)
        for found, values in self._lists:
            yield from zip(repeat(found), count(), values)

    def _tensors(self) -> Iterator[Place]:
        for container, key, value in self._entries(_NO_TENSORS):
            if isinstance(value, Tensor | tuple):
                yield from Place.all_of(container, key, value)

    def put_back(self, swaps: Mapping[int, Tensor] | None = None) -> None:
        """Restore the contents, with the tensors whose ids are in `swaps` replaced; values stay unwritten."""
        super().put_back()
        if swaps:
            self._swap(swaps)

    def guard_iterators(self) -> None:
        """Make every iterator refuse to advance, until `put_back`."""
        for container, key, value in self._entries():
            if is_iterator(value):
                container[key] = RefusingIterator(key, value)

    def _swap(self, swaps: Mapping[int, Tensor]) -> None:
        for container, key, value, tensor in self.tensors:
            if id(tensor) in swaps:
                container[key] = substituted(value, swaps)
        for mapping, keys, _ in self._mappings:
            if keys and isinstance(keys[0], Tensor):
                entries = [(substituted(key, swaps), mapping[key]) for key in keys]
                mapping.clear()
                mapping.update(entries)
        for kept, members in self._sets:
            if any(isinstance(member, Tensor) for member in members):
                kept.clear()
                kept.update(substituted(member, swaps) for member in members)

    @torch.no_grad()
    def put_values_back(self) -> None:
        """Write the kept values into their tensors, even if a pass has changed their shapes."""
        for kept, gradient in self._gradients:
            kept.grad = gradient
        written = {id(t): t for *_, t in self.tensors if id(t) in self.values}
        same = {i: t for i, t in written.items() if t.shape == self.values[i].shape and t.dtype == self.values[i].dtype}
        # A graph may have saved the tensor; .data does not count as modification.
        copy_into([t.data for t in same.values()], [self.values[i] for i in same])
        for i, tensor in written.items():
            if i not in same:
                tensor.data = self.values[i].clone()

    def check_written(self) -> None:
        """Raise if a pass has written to a tensor whose value is not kept."""
        for container, key, _, tensor in self.tensors:
            if id(tensor) in self._versions and self._versions[id(tensor)] != tensor._version:
                raise MetaKDError(
                    f"a forward pass writes to a tensor of {tensor.numel()} numbers that is no buffer "
                    f"({key!r} of {_owner(container)}), so virtual passes would change it; register it: "
                    "module.register_buffer(name, tensor, persistent=False)"
                )

    def translated(self, names: Mapping[int, Tensor]) -> PythonState:
        """A copy in which the tensors in `names` (by id) are replaced by those there, with their present values.

        Other tensors lose tangents and graphs: what one pass leaves behind is a constant for the next.
        """
        new = object.__new__(PythonState)
        now = {id(t): names.get(id(t), _constant(t)) for *_, t in self.tensors}

        def translate(value: Any) -> Any:
            return substituted(value, now) if isinstance(value, Tensor | tuple) else value

        # Keys and members, too: dicts and sets may hold parameters of the pass that ends here.
        new._mappings = [(m, [*map(translate, keys)], [*map(translate, values)]) for m, keys, values in self._mappings]
        new._sets = [(found, {*map(translate, members)}) for found, members in self._sets]
        new._lists = [(found, [translate(v) for v in values]) for found, values in self._lists]
        vars(new).update({name: value for name, value in vars(self).items() if name not in vars(new)})
        new.tensors, new._versions, new._gradients = list(new._tensors()), {}, []
        pairs = [(old.tensor, kept.tensor) for old, kept in zip(self.tensors, new.tensors, strict=True)]
        changing = [(old, kept) for old, kept in pairs if id(old) in self.values and not kept.requires_grad]
        values = clones([_constant(old) for old, _ in changing])
        new.values = {id(kept): value for (_, kept), value in zip(changing, values, strict=True)}
        return new


def _constant(tensor: Tensor) -> Tensor:
    """A tensor as the next pass reads it: no tangent, no graph; parameters stay themselves."""
    if tensor.is_leaf and tensor.requires_grad:
        return tensor
    primal: Tensor = forward_ad.unpack_dual(tensor).primal
    return primal.detach()


def _owner(container: Any) -> str:
    return "an object" if not isinstance(container, deque | list) else f"a {type(container).__name__}"
