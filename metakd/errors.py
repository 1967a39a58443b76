"""The library's only exception type."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MetaKDError(Exception):
    """The library cannot do something; the message names the cause and the cure.

    Every message quotes what was wrong (names, shapes, numbers) and says what to change. The call that raised it has
    been undone: the student, its optimizer and the weight model are bit for bit what they were before.

    Examples:
        >>> raise MetaKDError("no terms were given; pass at least one, e.g. {'hard': CrossEntropy()}")
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: no terms were given; pass at least one, e.g. {'hard': CrossEntropy()}
    """


@contextmanager
def explained() -> Iterator[None]:
    """A block in which torch's errors with a known cure become a `MetaKDError` that names it.

    Examples:
        >>> with explained():
        ...     raise RuntimeError("When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()")
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: activation checkpointing with re-entry does not work with torch.autograd.grad; ...
    """
    try:
        yield
    except RuntimeError as error:
        for words, meaning in _CURES.items():
            if words in str(error):
                raise MetaKDError(meaning) from error
        raise


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """A block in which every exception becomes a `MetaKDError` that says where it was raised.

    Running out of memory stays as it is, as callers may catch it and continue with a smaller batch.

    Examples:
        >>> with blamed("batch_fn"):
        ...     {}["labels"]
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: batch_fn raised KeyError: 'labels'
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except MetaKDError as error:
        raise MetaKDError(f"{what}: {error}") from error
    except Exception as error:
        raise MetaKDError(f"{what} raised {type(error).__name__}: {error}") from error


_CURES = {
    "use_reentrant=True": (
        "activation checkpointing with re-entry does not work with torch.autograd.grad; pass use_reentrant=False to "
        "torch.utils.checkpoint.checkpoint"
    ),
    "donated buffer": (
        "a compiled function inside the student frees its graph after one backward pass; set "
        "torch._functorch.config.donated_buffer = False before the first step, or compile the student as a whole"
    ),
}
