"""Clocks, and how long a call takes by them."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.methods import Call


class Instant:
    """A point in the GPU's own time; the difference of two waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000


Clock = Callable[[], Any]
"""Gives points in time, whose difference is in seconds."""
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time, "device": Instant}
CALLS = 10
"""Calls that are timed together on a GPU, as in a loop that does not wait for it."""
BLOCK = 0.02
"""Seconds of plain calls that are timed together on a CPU: the first calls after a pause take longer than a loop's."""


def timed(call: Call, clock: Clock, calls: int = 1) -> tuple[float, Sequence[Tensor]]:
    """The mean seconds of some calls, and what the last one gave."""
    gc.collect()
    synchronize()
    start = clock()
    for _ in range(calls):
        result = call()
    if clock is not Instant:
        synchronize()
    return round((clock() - start) / calls, 7), result


def enough(plain: Call) -> int:
    """How many calls are timed together on a CPU."""
    timed(plain, time.perf_counter)  # warm
    return min(max(round(BLOCK / timed(plain, time.perf_counter, 3)[0]), 1), 50)


def synchronize() -> None:
    """Wait for what the GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
