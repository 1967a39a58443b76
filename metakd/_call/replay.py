"""An iteration of a training loop that a GPU repeats as one CUDA graph."""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metakd._basics.nest import map_tensors, tensors
from metakd.errors import MetaKDError

Constants = Mapping[str, Hashable]
WARM_UP = 3
"""Calls as written before a capture."""
_MOST = 8
"""Graphs that are kept: the shapes of batches may differ, as at the end of an epoch."""
_PATIENCE = 50
"""Calls after which an iteration that could not be captured yet is warned about."""


class Replay:
    """Calls an iteration as written a few times, captures it, and from then on replays the graph.

    What a graph holds as constants is told by `constants`. When that changes, all graphs are dropped, and the iteration
    is captured anew. Batches of another shape have a graph of their own. Without a GPU every call is as written.

    Args:
        iteration: called with nests of tensors; what it returns is the same objects after each replay.
        device: on which it runs.
        constants: numbers and objects that the iteration's code reads, by name.
        captured: called after a capture; what it returns is called after each replay of that graph.

    Attributes:
        captures: whether it captures at all.

    Examples:
        >>> double = Replay(lambda x: 2 * x, torch.device("cpu"), dict)
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(
        self,
        iteration: Callable[..., Any],
        device: torch.device,
        constants: Callable[[], Constants],
        captured: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        self.iteration, self.device, self._constants, self._captured = iteration, device, constants, captured
        self.captures = device.type == "cuda"
        self._now: Constants = {}
        self._shapes: dict[str, _Shape] = {}
        self._stream: Any = None
        self._unsteady, self._calls = set[str](), 0

    def __call__(self, *items: Any) -> Any:
        """One iteration on these batches; results are overwritten by the next one."""
        if not self.captures:
            return self.iteration(*items)
        self._calls += 1
        now = self._constants()
        if changed := [name for name in now if now[name] != self._now.get(name)]:
            self._now, self._shapes = now, {}
            self._unsteady.update(changed if self._calls > 1 else ())
            self._warn_if_never_captured()
        kind = repr(map_tensors(_described, items))
        if kind not in self._shapes and len(self._shapes) == _MOST:
            return self.iteration(*items)
        shape = self._shapes.setdefault(kind, _Shape(items, self.device))
        shape.fill(items)
        if shape.replay is not None:
            return shape.replay()
        if shape.calls < WARM_UP:
            shape.calls += 1
            return self._aside(shape)
        self._capture(shape)
        self._unsteady, self._calls = set(), 0
        return shape.replay() if shape.replay else None

    def _aside(self, shape: "_Shape") -> Any:
        """The iteration on the stream of the capture, as torch asks for before one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self.iteration(*shape.items)
        here.wait_stream(self._stream)
        return result

    def _capture(self, shape: "_Shape") -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader's that pins memory, may go on.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = self.iteration(*shape.items)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture raises an error of its own
            if isinstance(cause, MetaKDError):
                raise cause from None
            raise MetaKDError(
                f"this iteration cannot be captured in a CUDA graph: {cause}. A graph may not read from the device "
                "(.item(), float(), bool(), print), nor allocate or copy from unpinned memory of the CPU, and Adam and "
                "its like need capturable=True; gradient scalers read, too"
            ) from cause
        after = self._captured()

        def replay() -> Any:
            graph.replay()
            after()
            return result

        shape.replay = replay

    def _warn_if_never_captured(self) -> None:
        if self._calls == _PATIENCE:
            warnings.warn(
                f"in {_PATIENCE} calls this iteration was not captured in a CUDA graph, because what a graph would "
                f"hold as a constant changes from call to call: {', '.join(sorted(self._unsteady))}. It runs as "
                "written",
                stacklevel=3,
            )


class _Shape:
    """The tensors that a graph reads its batches from, and its replay once it is captured."""

    def __init__(self, items: Sequence[Any], device: torch.device) -> None:
        self.calls, self.replay = 0, None  # type: int, Callable[[], Any] | None
        self._tensors: list[Tensor] = []
        self.items = map_tensors(lambda t: self._kept(t, device), tuple(items))

    def _kept(self, tensor: Tensor, device: torch.device) -> Tensor:
        self._tensors.append(tensor.detach().to(device, copy=True))
        return self._tensors[-1]

    def fill(self, items: Sequence[Any]) -> None:
        """Copy the batches' values."""
        for mine, given in zip(self._tensors, tensors(tuple(items)), strict=True):
            mine.copy_(given, non_blocking=True)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
