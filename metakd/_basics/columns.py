"""Named columns of a batch: groups of samples, such as their source."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metakd._basics.sizes import described, is_integer
from metakd.errors import MetaKDError

RESERVED = ("inputs", "targets", "teacher", "index", "size", "columns", "term", "weight")
"""Names that no column may have: a batch's own fields, and the columns of exported weights."""


def check_columns(columns: Any, what: str, size: int | None) -> None:
    """Raise unless the columns map names to integers `(size,)`, or of one length if the size is None."""
    if not isinstance(columns, Mapping):
        raise MetaKDError(
            f"the columns of {what} are {described(columns)}; pass a mapping of names to integers of shape (B,), such "
            'as Batch(columns={"source": ids})'
        )
    for name, values in columns.items():
        if not isinstance(name, str) or name in RESERVED:
            raise MetaKDError(
                f"{what} has a column named {name!r}; its name must be a string other than {', '.join(RESERVED)}, "
                "which name a batch's own fields and the columns of exported weights"
            )
        if not isinstance(values, Tensor) or values.ndim != 1 or not is_integer(values):
            raise MetaKDError(
                f"the column {name!r} of {what} must hold integers of shape (B,), one per sample, but it is "
                f"{described(values)}; number its groups from 0, and put other data into inputs or targets"
            )
        size = len(values) if size is None else size
        if len(values) != size:
            raise MetaKDError(
                f"the column {name!r} of {what} has {len(values)} values for {size} samples; give each sample one"
            )
