"""Makes losses that draw random numbers pure: a repeated evaluation draws the same numbers."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from metakd._basics.rng import RngState


class Replay:
    """Named blocks: a block entered again starts with the generators of its first time.

    Only first times advance the generators, so that in the end each block has drawn once.

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
