"""What an iteration of each method costs beside KD's."""

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.common.clocks import synchronize
from benchmarks.common.measure import peak_memory
from benchmarks.longtail import methods
from benchmarks.longtail.presets import Preset
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.train import Cell, Where, data_of, network, optimizer_of

PERIOD = 5
"""Iterations that are timed together: as many as the longest rhythm of a method."""


def iterations(cell: Cell, preset: Preset, where: Where) -> Iterator[None]:
    """Training without end, one iteration at a time; the networks are untrained, which costs the same."""
    data = data_of(cell, preset, where)
    student = network(cell, preset, where)
    teacher = network(cell, preset.of_teacher(), where).eval().requires_grad_(False)
    optimizer = optimizer_of(student, preset)
    objective = methods.find(cell.method)(Setting(student, teacher, optimizer, data.counts, preset))
    for _, loss in objective.epoch(0, data.train.endless(0), data.validation.endless(0)):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def memory(cell: Cell, preset: Preset, where: Where) -> float:
    """The peak memory of some iterations in MB; call it in a process of its own."""
    torch.set_num_threads(1)
    return peak_memory(lambda: advance(iterations(cell, preset, where)), where.device)["peak"]


def advance(training: Iterator[None]) -> float:
    """Seconds of `PERIOD` iterations."""
    start = time.perf_counter()
    for _ in range(PERIOD):
        next(training)
    synchronize()
    return time.perf_counter() - start


def measure(cell: Cell, names: Sequence[str], preset: Preset, where: Where, rounds: int = 10) -> dict[str, Any]:
    """Time and memory of some methods, KD among them.

    Args:
        cell: data set, imbalance and seed.
        names: of the methods.
        preset: networks and batch size.
        where: data and device.
        rounds: each times every method once, `PERIOD` iterations long.

    Returns:
        methods: name -> `time`, the median over the rounds of its ratio to KD's, and `memory`, the peak in MB.
    """
    running = {name: iterations(cell._replace(method=name), preset, where) for name in dict.fromkeys(["kd", *names])}
    for training in running.values():
        advance(training)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        order = list(running)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(advance(running[name]))
    found = {}
    for name, taken in seconds.items():
        ratio = statistics.median(own / kd for own, kd in zip(taken, seconds["kd"], strict=True))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(memory, cell._replace(method=name), preset, where).result()
        found[name] = {"time": round(ratio, 4), "memory": round(peak, 1), "seconds": statistics.median(taken) / PERIOD}
    return {"rounds": rounds, "methods": found}
