"""Variables of functions, classes and modules as mappings, so that they can be captured and restored like dicts."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any


class Variables(MutableMapping[Any, Any]):
    """Some entries of another mapping."""

    def __init__(self, variables: Any, names: Sequence[str]) -> None:
        self._variables, self._names = variables, names

    def __getitem__(self, name: str) -> Any:
        return self._variables[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._variables[name] = value

    def __delitem__(self, name: str) -> None:
        del self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self._variables)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Cell(MutableMapping[Any, Any]):
    """A closure's variable, under the key "value"."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # the variable has no value yet
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self._cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cell.cell_contents

    def __iter__(self) -> Iterator[str]:
        try:
            _ = self._cell.cell_contents
        except ValueError:
            return
        yield "value"

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ClassVariables(Variables):
    """A class's variables, without methods."""

    def __init__(self, owner: type) -> None:
        self._owner = owner
        names = [n for n, v in vars(owner).items() if not n.startswith("__") and not hasattr(v, "__get__")]
        super().__init__(vars(owner), names)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)


class Slots(MutableMapping[Any, Any]):
    """The attributes of an object whose class has `__slots__`."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._names = owner, slots_of(owner)

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def slots_of(value: Any) -> tuple[str, ...]:
    """The names of an object's slots, with or without a value."""
    kind: Any = type(value)  # mypy does not take a class for hashable
    return _slots(kind)


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for c in kind.__mro__ for name, v in vars(c).items() if isinstance(v, types.MemberDescriptorType))


class Scripted(MutableMapping[Any, Any]):
    """A scripted module's parameters or buffers, which torch wraps in an object that is no mapping."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getitem__(self, name: str) -> Any:
        return self._wrapped[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._wrapped[name] = value

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)  # scripted modules cannot lose entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._wrapped.keys())

    def __len__(self) -> int:
        return len(self._wrapped.keys())
