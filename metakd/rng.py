"""Random number generators as a value: captured, and put back."""

import random
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RngState(NamedTuple):
    """The state of every generator that a forward pass may draw from.

    Attributes:
        cpu: torch's CPU generator.
        cuda: torch's CUDA generators, by device index.
        python: the standard library's `random`.
        numpy: NumPy's legacy global generator; None where NumPy was not imported.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RngState":
        """Read all generators; of CUDA's, those of the given devices.

        Example:
            >>> state = RngState.capture([])
            >>> first = torch.rand(3)
            >>> state.restore()
            >>> torch.equal(first, torch.rand(3))
            True
        """
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            {d.index or 0: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"},
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Put every generator back to this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
