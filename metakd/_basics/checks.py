"""Checks of numbers on the device. Those of one call are read together, by a single host sync."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from metakd._basics.nest import version_of
from metakd._basics.rng import capturing
from metakd.errors import MetaKDError

Judge = Callable[..., None]
"""Takes a check's numbers, and raises or warns if they are bad."""


class Waiting:
    """Checks whose numbers are not read yet.

    Attributes:
        captured: whether the numbers belong to a CUDA graph, whose replays renew them.
    """

    def __init__(self) -> None:
        self._checks: list[tuple[list[Tensor], Judge]] = []
        self._finite: list[tuple[list[Tensor], weakref.ref[Tensor], Tensor]] = []
        self._made: dict[Hashable, tuple[weakref.ref[Tensor], Any]] = {}
        self.captured = capturing()

    def add(self, numbers: tuple[Tensor, ...], judge: Judge) -> None:
        """Keep a check for later."""
        self._checks.append(([value.detach().reshape(1) for value in numbers], judge))

    def add_finite(self, values: Tensor, judge: Judge) -> None:
        """Keep a check whose number is NaN or infinite if an entry of `values` is: `implied` gives it, or their sum."""
        number: list[Tensor] = []
        self._finite.append((number, weakref.ref(values), values.detach()))  # which keeps no graph
        self._checks.append((number, judge))

    def implied(self, number: Tensor, values: Tensor) -> None:
        """Give the number of the open checks of these values."""
        for found, checked, _ in self._finite:
            if checked() is values and not found:
                found.append(number.detach().reshape(1))

    def once(self, tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` made of these values of the tensor with this key, or makes now."""
        full = id(tensor), version_of(tensor), key
        if full not in self._made:
            # Forgotten with the tensor: a term may make one anew in every pass, and a new one could reuse the id.
            self._made[full] = weakref.ref(tensor, lambda _: self._made.pop(full, None)), make()
        return self._made[full][1]

    def settle(self) -> None:
        """Compute the numbers that are still missing."""
        self._made = {}
        for found, _, values in self._finite:
            if not found:
                found.append(values.sum().reshape(1))
        self._finite = []

    def judge(self) -> None:
        """Read all numbers of a device at once, and judge them in order."""
        self.settle()
        checks = self._checks
        if not self.captured:
            self._checks = []
        every = [value for values, _ in checks for value in values]
        read: dict[int, float] = {}
        for device in {value.device for value in every}:
            here = [value for value in every if value.device == device]
            read.update(zip(map(id, here), _numbers(torch.cat(here)), strict=True))
        for values, judge in checks:
            judge(*(read[id(value)] for value in values))

    def failure(self) -> MetaKDError | None:
        """The first failed check's error; None if none fails, or if the device is lost."""
        try:
            self.judge()
        except MetaKDError as error:
            return error
        except RuntimeError:
            return None
        return None


def _numbers(values: Tensor) -> list[float]:
    """The entries, by one sync."""
    try:
        found: list[float] = values.tolist()
    except RuntimeError:  # torch.func has no tolist in torch 2.6
        return list(map(float, values.cpu()))
    return found


_open: ContextVar[Waiting | None] = ContextVar("_open", default=None)


@contextmanager
def read_at_end(later: Callable[[Waiting], None] | None = None) -> Iterator[Waiting]:
    """A block whose checks are read at its end, or before an exception leaves it: a failed check may be the cause.

    `later` takes checks that shall not be read at the block's end.

    Examples:
        >>> with read_at_end():
        ...     check(print, torch.tensor(1.0), torch.tensor(2.0))
        ...     print("end")
        end
        1.0 2.0
    """
    waiting = Waiting()
    token = _open.set(waiting)
    try:
        yield waiting
    except Exception as error:
        _open.reset(token)
        cause = waiting.failure()
        if cause is None:
            raise
        raise cause from error
    except BaseException:
        _open.reset(token)
        raise
    _open.reset(token)
    if later is None:
        waiting.judge()
    else:
        waiting.settle()  # a graph that captures the call has to hold all numbers
        later(waiting)


def check(judge: Judge, *numbers: Tensor) -> None:
    """Let `judge` see numbers, tensors of one entry: at the end of an open block, else now.

    Without a block nothing is checked while a CUDA graph is captured: nobody could read the numbers of its replays.
    """
    waiting = _open.get()
    if waiting is not None:
        waiting.add(numbers, judge)
    elif not capturing():
        alone = Waiting()
        alone.add(numbers, judge)
        alone.judge()


def check_finite(values: Tensor, say: Callable[[], None]) -> None:
    """Call `say` if an entry is NaN or infinite, or if the entries are so large that their sum is.

    In an open block it happens when the block's checks are read. `implied` may give a number for the sum then. Without
    a block nothing is checked while a CUDA graph is captured, see `check`.
    """

    def judge(total: float) -> None:
        if not math.isfinite(total):
            say()

    waiting = _open.get()
    if waiting is not None:
        waiting.add_finite(values, judge)
    elif not capturing():
        judge(float(values.detach().sum()))


def implied(number: Tensor, *values: Tensor) -> None:
    """Say that a number is NaN or infinite if an entry of `values` is, so that their open checks need no kernel."""
    if (waiting := _open.get()) is not None:
        for each in values:
            waiting.implied(number, each)


def checked_before(tensor: Tensor, key: Hashable) -> bool:
    """Whether the open block has seen the tensor with this key already; notes that it has."""
    now: list[None] = []
    once(tensor, ("checked", key), lambda: now.append(None))
    return not now


def once(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` makes of a constant tensor's values; in an open block it runs once for the tensor and the key."""
    waiting = _open.get()
    return make() if waiting is None else waiting.once(tensor, key, make)
