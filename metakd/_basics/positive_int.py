"""A check that many arguments need."""

from operator import index

from metakd.errors import MetaKDError


def positive_int(value: int, name: str) -> int:
    """Return the value if it is an integer of at least 1, or raise."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < 1:
        raise MetaKDError(f"{name} is {value!r}, but must be an integer of at least 1")
    return index(value)
