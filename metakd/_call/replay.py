"""An iteration of a training loop that a GPU repeats as one CUDA graph."""

import warnings
from collections import Counter
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
"""Shapes of batches whose graphs are kept; they may differ, as at the end of an epoch."""
_PATIENCE = 50
"""Calls after which an iteration that could not be captured yet is warned about."""


class Host:
    """What an iteration does in Python, which a replay does not do; this one: nothing.

    Args:
        constants: numbers and objects that its code reads, by name, which a graph holds as they were.
    """

    def __init__(self, constants: Callable[[], Constants] = dict) -> None:
        self.constants = constants

    def phase(self) -> Hashable:
        """Tells calls apart that take turns at different things."""
        return None

    def before_capture(self) -> None:
        """Note where the captured call starts."""

    def after_capture(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """What to do before and after each replay of the graph that was captured last."""
        return lambda: None, lambda: None


class Replay:
    """Calls an iteration as written a few times, captures it, and from then on replays the graph.

    When the host's constants change, all graphs are dropped, and the iteration is captured anew. Batches of another
    shape have a graph of their own, and so has each of the host's phases. Without a GPU every call is as written.

    Args:
        iteration: called with nests of tensors; what it returns is the same objects after each replay.
        device: on which it runs.
        host: what the iteration does beside.

    Attributes:
        captures: whether it captures at all.

    Examples:
        >>> double = Replay(lambda x: 2 * x, torch.device("cpu"))
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, iteration: Callable[..., Any], device: torch.device, host: Host | None = None) -> None:
        self.iteration, self.device, self.host = iteration, device, host or Host()
        self.captures = device.type == "cuda"
        self._now: Constants = {}
        self._shapes: dict[str, _Shape] = {}
        self._stream: Any = None
        self._pool: Any = None
        self._unsteady, self._calls = set[str](), 0

    def __call__(self, *items: Any) -> Any:
        """One iteration on these batches; results are overwritten by the next one."""
        if not self.captures:
            return self.iteration(*items)
        self._calls += 1
        now = self.host.constants()
        if changed := [name for name in now if now[name] != self._now.get(name)]:
            self._now, self._shapes, self._pool = now, {}, None
            self._unsteady.update(changed if self._calls > 1 else ())
            self._warn_if_never_captured()
        kind = repr(map_tensors(_described, items))
        if kind not in self._shapes and len(self._shapes) == _MOST:
            return self.iteration(*items)
        if kind not in self._shapes:
            self._shapes[kind] = _Shape(items, self.device)
        shape = self._shapes[kind]
        shape.fill(items)
        phase = self.host.phase()
        if phase not in shape.replays:
            shape.calls[phase] += 1
            if shape.calls[phase] <= WARM_UP:
                return self._aside(shape)
            shape.replays[phase] = self._capture(shape)
            self._unsteady, self._calls = set(), 0
        return shape.replays[phase]()

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

    def _capture(self, shape: "_Shape") -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        self.host.before_capture()
        # Graphs are replayed one after the other, and what one leaves for the next is held by the host: they share
        # their memory. Other threads, such as a loader's that pins memory, may go on.
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with warnings.catch_warnings(), torch.cuda.graph(graph, **options):
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # as after an error
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
        self._pool = graph.pool()
        before, after = self.host.after_capture()

        def replay() -> Any:
            before()
            graph.replay()
            after()
            return result

        return replay

    def _warn_if_never_captured(self) -> None:
        if self._calls >= _PATIENCE:
            self._calls = 0
            warnings.warn(
                f"in {_PATIENCE} calls this iteration was not captured in a CUDA graph, because what a graph would "
                f"hold as a constant changes from call to call: {', '.join(sorted(self._unsteady))}. It runs as "
                "written",
                stacklevel=3,
            )


class _Shape:
    """The tensors that graphs read their batches from; and by phase, calls as written and the replay."""

    def __init__(self, items: Sequence[Any], device: torch.device) -> None:
        self.calls = Counter[Hashable]()
        self.replays: dict[Hashable, Callable[[], Any]] = {}
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
