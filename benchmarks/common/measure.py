"""Time and memory of methods on a case. Each cell is a process of its own: `python -m benchmarks.common.measure`."""

import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.cases import CASES, Task
from benchmarks.common.clocks import CALLS, CLOCKS, Clock, enough, timed
from benchmarks.common.methods import Call

ROOT = Path(__file__).parents[2]
Prepare = Callable[[Task], Call]


def in_process(kind: str, **cell: Any) -> dict[str, Any]:
    """Measure a cell, on the CPU in a fresh process; where that dies, the cell says so.

    On a GPU memory is that of torch's allocator, which needs no process of its own, and a start takes seconds.

    Its kind is `time` (`time_cell`), `memory` (`memory_cell`), or one that the methods' module has in `CELLS`.
    """
    if cell["device"] == "cuda":
        try:
            return measured({"kind": kind, **cell})
        except Exception as error:  # as if the process had died of it
            return {"died": shorten(f"{type(error).__name__}: {error}", 160)}
    command = [sys.executable, "-m", "benchmarks.common.measure", json.dumps({"kind": kind, **cell})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        return {"died": f"killed by signal {-done.returncode} (too little memory?)"}
    return {"died": shorten((done.stderr.strip() or "no message").splitlines()[-1], 160)}


def time_cell(
    task: Task,
    methods: Mapping[str, Prepare],
    *,
    repeats: int,
    seconds: float,
    reference: str = "by hand",
    clock: Clock = time.perf_counter,
    calls_at_once: int | None = None,
) -> dict[str, Any]:
    """Rounds of all methods, with plain steps before each of them; first calls are not timed.

    Args:
        task: of the cell; each method gets a copy.
        methods: "plain", the unit, among them.
        repeats: most rounds.
        seconds: no new round starts after so many.
        reference: the method whose hypergradient the others' are compared with.
        clock: in seconds.
        calls_at_once: calls that are timed together; a time is their mean. By default see `clocks.enough`.

    Returns:
        at_once: calls that were timed together. rounds: name -> seconds in each round; for "plain" the list of its
        steps. errors: relative errors of the hypergradients. failed: name -> why, for methods that raised.
    """
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a peer may fail in any way, and the others shall go on
            calls.pop(name, None)
            failed[name] = shorten(f"{type(error).__name__}: {error}", 160)
            return None

    def warm_up(name: str) -> None:
        call = methods[name](copy.deepcopy(task))
        call()  # a balancer proves its virtual passes in its first call, which benchmarks.first_call measures
        calls[name] = call

    for name in methods:
        attempt(name, partial(warm_up, name))
    plain = calls.pop("plain")
    calls_at_once = calls_at_once or enough(plain)
    found: dict[str, Tensor] = {}
    rounds: list[dict[str, Any]] = []
    start = clock()
    while len(rounds) < repeats and (not rounds or clock() - start < seconds):
        names = list(calls)
        shift = len(rounds) % max(len(names), 1)  # nobody always follows the same one
        this: dict[str, Any] = {"plain": []}
        for name in names[shift:] + names[:shift]:
            this["plain"] += [timed(plain, clock, calls_at_once)[0] for _ in range(max(len(task.batches) // 4, 1))]
            if (result := attempt(name, partial(timed, calls[name], clock, calls_at_once))) is not None:
                this[name], gradient = result
                if gradient:
                    found[name] = torch.cat([g.detach().flatten() for g in gradient])
        rounds.append(this)
    return {"at_once": calls_at_once, "rounds": rounds, "errors": _relative_errors(found, reference), "failed": failed}


def _relative_errors(found: Mapping[str, Tensor], reference: str) -> dict[str, float]:
    if reference not in found:
        return {}
    right = found[reference]
    return {name: float((value - right).norm() / right.norm()) for name, value in found.items() if name != reference}


def memory_cell(case: str, task: Task, prepare: Prepare, device: str) -> dict[str, float]:
    """Memory of a method's first call after one step on two samples, which loads the libraries; see `peak_memory`.

    On CUDA that of its preparation too, for a CUDA graph takes its memory when it is captured.
    """
    prepare(Task.build(CASES[case], 1, batch_size=2, device=device))()
    if device == "cuda":
        gc.collect()
        return peak_memory(lambda: prepare(task)(), device)
    call = prepare(task)
    gc.collect()
    return peak_memory(call, device)


def peak_memory(call: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Memory in MB `before` a call and at its `peak`: resident in this process, on CUDA given out by the allocator.

    On the CPU the peak is that since the process began.
    """
    if device == "cpu":
        before = _resident()[0]
        call()
        peak = _resident()[1]
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return {"before": round(before / 1e6, 1), "peak": round(peak / 1e6, 1)}


def _resident() -> tuple[int, int]:
    """Resident memory of this process in bytes, now and at its peak."""
    # Linux's ru_maxrss starts at the peak of the process that started this one; VmHWM is this one's own.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, peak
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def main() -> None:
    """Measure the cell that the command line describes as JSON, and print it as JSON."""
    cell = json.loads(sys.argv[1])
    _limit_memory()
    print(json.dumps(measured(cell)))


def measured(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the cell in this process."""
    torch.set_num_threads(cell["threads"])
    module = import_module(cell["module"])
    if cell["kind"] in getattr(module, "CELLS", {}):
        return dict(module.CELLS[cell["kind"]](cell))
    options = {"batch_size": cell["batch_size"], "teacher": cell.get("teacher", False), "device": cell["device"]}
    task = Task.build(CASES[cell["case"]], cell["steps"], **options)
    methods = module.METHODS
    if cell["kind"] == "time":
        chosen = {name: methods[name] for name in cell["methods"]}
        limits = {"repeats": cell["repeats"], "seconds": cell["seconds"]}
        at_once = CALLS if cell["device"] == "cuda" else None
        return time_cell(task, chosen, **limits, clock=CLOCKS[cell.get("clock", "wall")], calls_at_once=at_once)
    return memory_cell(cell["case"], task, methods[cell["method"]], cell["device"])


def _limit_memory() -> None:
    """Let an allocation that this machine has no room for fail, instead of ending the process with all its methods."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * available), resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
