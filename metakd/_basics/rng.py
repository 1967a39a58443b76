"""The state of all random number generators: captured, and restored."""

import random
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing can be read from the device, and generators cannot be set."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class RngState(NamedTuple):
    """The state of every generator that a forward pass may draw from.

    Attributes:
        cpu: torch's CPU generator.
        cuda: torch's CUDA generators, by device index.
        python: the standard library's `random`; None if unknown.
        numpy: NumPy's legacy global generator; None if NumPy was not imported.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RngState":
        """Read all generators, and CUDA's of the given devices.

        Examples:
            >>> state = RngState.capture([])
            >>> first = torch.rand(3)
            >>> state.restore()
            >>> torch.equal(first, torch.rand(3))
            True
        """
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            {} if capturing() else {d.index or 0: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"},
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Set every generator to this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            import_module("numpy").random.set_state(self.numpy)

    def same(self, other: "RngState") -> bool:
        """Whether nothing was drawn from a generator between the two."""
        pairs = [(self.cpu, other.cpu), *((state, other.cuda.get(index, state)) for index, state in self.cuda.items())]
        numpy = [None if state is None else [str(part) for part in state] for state in (self.numpy, other.numpy)]
        return all(torch.equal(a, b) for a, b in pairs) and self.python == other.python and numpy[0] == numpy[1]

    def plain(self) -> dict[str, Any]:
        """The state as tensors, numbers and containers, which `torch.load(weights_only=True)` can read."""
        numpy = self.numpy and (self.numpy[0], self.numpy[1].tolist(), *self.numpy[2:])
        return {**self._asdict(), "numpy": numpy}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "RngState":
        """Rebuild a state from `plain()`, without CUDA devices that this machine lacks."""
        cuda = {i: s for i, s in dict(state["cuda"]).items() if i < torch.cuda.device_count()}
        return cls(state["cpu"], cuda, state.get("python"), state.get("numpy"))
