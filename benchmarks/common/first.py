"""The first call of a balancer, in which virtual passes are proven, and the calls after it."""

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.common import loops
from benchmarks.common.cases import CASES, Task
from benchmarks.common.clocks import CLOCKS, timed

STEADY = 3
VERIFY = {"verify=True": True, "verify=False": False}
METHODS = {f"{when}, {name}": name for name in VERIFY for when in ("first", "steady")}


def first_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of new balancers: a whole iteration with the first call of each, then some more of its iterations.

    Plain iterations go before each. One round before the first is not counted: it loads what torch loads late.

    Returns:
        rounds: name -> seconds in each round, the median for steady ones; for "plain" the list of its iterations.
    """
    clock = CLOCKS[cell.get("clock", "wall")]
    task = Task.build(CASES[cell["case"]], 1, batch_size=cell["batch_size"], device=cell["device"])
    one_round(task, clock)
    rounds: list[dict[str, Any]] = []
    start = clock()
    while len(rounds) < cell["repeats"] and (not rounds or clock() - start < cell["seconds"]):
        rounds.append(one_round(task, clock))
    return {"rounds": rounds}


def one_round(task: Task, clock: Callable[[], float]) -> dict[str, Any]:
    """The seconds of each of `METHODS`, and of the plain iterations."""
    found: dict[str, Any] = {"plain": []}
    plain = loops.plain(copy.deepcopy(task))
    for name, verify in VERIFY.items():
        call = loops.by_metakd(copy.deepcopy(task), verify=verify)
        found["plain"] += [timed(plain, clock)[0] for _ in range(STEADY)]
        found[f"first, {name}"] = timed(call, clock)[0]
        found[f"steady, {name}"] = statistics.median(timed(call, clock)[0] for _ in range(STEADY))
    return found


CELLS = {"first": first_cell}
