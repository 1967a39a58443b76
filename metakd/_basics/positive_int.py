"""A check for arguments that count something."""

from operator import index

from metakd.errors import MetaKDError


def positive_int(value: int, name: str) -> int:
    """Return the value if it is an integer of at least 1; raise a `MetaKDError` otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < 1:
        raise MetaKDError(f"{name} is {value!r}, but must be an integer of at least 1")
    return index(value)
