"""Losses that draw random numbers as pure functions: what is evaluated again draws the same ones."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from metakd._basics.rng import RngState


class Replay:
    """Blocks by name; one that is entered again starts with the generators as at the first time.

    The first time the block draws on, so that in the end the generators are as after each block once, in the order of
    the first times.

    Args:
        devices: whose generators are meant, beside the CPU's.

    Examples:
        >>> replay = Replay([])
        >>> with replay("step 0"):
        ...     first = torch.rand(2)
        >>> with replay("step 0"):
        ...     print(torch.equal(first, torch.rand(2)))
        True
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = set(devices)
        self._starts: dict[Hashable, RngState] = {}

    @contextmanager
    def __call__(self, name: Hashable) -> Iterator[None]:
        """Enter the block of this name."""
        now = RngState.capture(self._devices)
        start = self._starts.setdefault(name, now)
        if start is now:
            yield
            return
        start.restore()
        try:
            yield
        finally:
            now.restore()
