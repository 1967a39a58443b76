"""Iterators that a student holds. Nothing can rewind them, so virtual passes must not advance them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from metakd.errors import MetaKDError


def is_iterator(value: Any) -> bool:
    """Whether a value is an iterator."""
    kind: Any = type(value)  # mypy does not take a class for hashable
    return _makes_iterators(kind)


@lru_cache(maxsize=4096)
def _makes_iterators(kind: type) -> bool:
    return hasattr(kind, "__next__") and not issubclass(kind, nn.Module)


class RefusingIterator:
    """Takes an iterator's place and refuses to advance.

    Examples:
        >>> next(RefusingIterator("numbers", iter([])))
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: a forward pass takes the next item of an iterator ('numbers', a list_iterator)...
    """

    def __init__(self, key: Any, iterator: Any) -> None:
        self._key, self._iterator = key, iterator

    def __iter__(self) -> RefusingIterator:
        return self

    def __next__(self) -> Any:
        raise MetaKDError(
            f"a forward pass takes the next item of an iterator ({self._key!r}, a {type(self._iterator).__name__}), "
            "which a virtual pass cannot put back; keep a number, or a list and a position in it"
        )
