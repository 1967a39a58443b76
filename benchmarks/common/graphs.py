"""Calls as CUDA graphs: launched once, and then replayed as a whole."""

from collections.abc import Callable
from typing import Any

import torch

from metakd import MetaKDError

WARM_UP = 3
"""Calls before a capture."""


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the call as a CUDA graph, and returns what the captured one returned.

    The call must do the same to the same tensors each time. It runs `WARM_UP` times; the capture itself runs nothing.

    Raises:
        MetaKDError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise MetaKDError("CUDA graphs need a GPU")
    for _ in range(WARM_UP):
        aside(call)
    return capture(call)


def aside(call: Callable[[], Any]) -> Any:
    """The call on a stream of its own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
