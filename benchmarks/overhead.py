"""What a small student costs: kernels, host syncs and time of an iteration with learned weights over plain KD.

    python benchmarks/overhead.py --threads 1          # all cases and methods
    python benchmarks/overhead.py --preset smoke       # seconds: does it run?

Writes results.json and README.md to --output. The same command after an interruption goes on where it stopped. What
`notes.md` there says is put at the end of README.md. Needs `pip install -e ".[benchmarks]"`.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import launches, loops
from benchmarks.common.cases import CASES
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.markdown import (
    number,
    plain_milliseconds,
    provenance,
    table,
    verdict,
    what_failed,
    write_readme,
)
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content, entries, find, per_iteration

NAMES = [name for name in launches.METHODS if name != "plain"]
PRESETS = {
    "full": {
        "cases": ["resnet8x4", "resnet20", "mlp32", "transformer"], "repeats": 12,
        "seconds": 60.0, "output": ROOT / "benchmarks" / "results" / "overhead",
    },
    "smoke": {
        "cases": ["convnet4"], "repeats": 2, "seconds": 5.0, "output": Path("runs") / "overhead-smoke",
    },
}  # fmt: skip

TEXT = """\
# What a small student costs

{provenance}

On a GPU a small student is bound by the number of kernels and by waiting, not by arithmetic. So this counts, through
torch's dispatcher, what one iteration launches, the student's own step included. A kernel is an operation that neither
views nor allocates; an operation on a list of tensors is one. A host sync is an operation whose result Python needs.
"plain" is knowledge distillation written with torch's own functions. The optimizers take one kernel for all parameters
(`foreach`, `fused`), as is torch's default on a GPU. Teacher's outputs are given, the meta batch is as large as the
training batch, all checks of metakd are on, and the proof in the first call is not counted.

{cases}

## Kernels

Kernels of an iteration, and their ratio to plain.

{kernels}

## Host syncs

{syncs}

## Time

Over plain iterations: the median over the rounds, with the smallest and the largest behind it.

{times}

## Goals

{goals}
"""
KERNEL_GOALS = {"accumulate=1": 4.0, f"accumulate={loops.PERIOD}": 3.5, f"every={loops.PERIOD}": 1.6}
_WINDOWED = {f"accumulate={loops.PERIOD}": 2.9, f"every={loops.PERIOD}": 1.45}
TIME_GOALS = {
    "mlp32": {"accumulate=1": 4.5},
    "resnet8x4": {"accumulate=1": 3.5, **_WINDOWED, "simultaneous": 3.0},
    "resnet20": {"accumulate=1": 3.5, **_WINDOWED},
}


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    cases = entries(content, "case")
    counted = {case: find(content, kind="counts", case=case).get("counts", {}) for case in cases}
    names = ["plain", *NAMES]
    about = [
        [
            case,
            str(content["settings"]["batch_size"] or CASES[case].batch_size),
            plain_milliseconds([find(content, kind="time", case=case)]),
        ]
        for case in cases
    ]
    text = TEXT.format(
        provenance=provenance(content),
        cases=table(["case", "batch size", "plain iteration, ms: median (10 to 90 % of them)"], about),
        kernels=table(["", *cases], [[name, *(kernels(counted[case], name) for case in cases)] for name in names]),
        syncs=table(["", *cases], [[name, *(syncs(counted[case], name) for case in cases)] for name in names]),
        times=table(["", *cases], [[name, *(times(content, case, name) for case in cases)] for name in NAMES]),
        goals=table(["goal", "verdict"], goals(content, counted), left=2),
    )
    return [write_readme(folder, text + what_failed(content, lambda cell: cell["case"]))]


def kernels(counted: Mapping[str, Any], name: str) -> str:
    """A method's kernels and their ratio to plain."""
    if name not in counted:
        return ""
    mine, plain = counted[name]["kernels"], counted["plain"]["kernels"]
    return number(mine, ",.0f") if name == "plain" else f"{mine:,.0f} ({mine / plain:.2f})"


def syncs(counted: Mapping[str, Any], name: str) -> str:
    """A method's host syncs."""
    return f"{counted[name]['syncs']:g}" if name in counted else ""


def times(content: Content, case: str, name: str) -> str:
    """A method's time over plain."""
    found = per_iteration(content, case, name)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""


def goals(content: Content, counted: Mapping[str, Any]) -> list[list[str]]:
    """The goals with their verdicts."""
    rows = []
    small = [case for case in ("resnet8x4", "mlp32") if counted.get(case)]
    for name, limit in KERNEL_GOALS.items():
        found = {
            f"on {case}": counted[case][name]["kernels"] / counted[case]["plain"]["kernels"]
            for case in small
            if name in counted[case]
        }
        rows.append([f"kernels, `{name}`, at most {limit} times plain", verdict(found, limit)])
    waits = {f"on {case}": one["accumulate=1"]["syncs"] for case, one in counted.items() if "accumulate=1" in one}
    rows.append(["host syncs, `accumulate=1`, at most 1", verdict(waits, 1)])
    for case, limits in TIME_GOALS.items():
        for name, limit in limits.items():
            found = per_iteration(content, case, name)
            judged = verdict({f"on {case}": statistics.median(found) if found else None}, limit)
            rows.append([f"time, `{name}`, {case}, at most {limit} times plain", judged])
    return [row for row in rows if row[1]]


def main() -> None:
    """Count and measure the cells that are not in the record yet; then write the report."""
    args = parse(parser_of(__doc__, PRESETS, NAMES), PRESETS)
    names = ["plain", *args.methods]
    jobs = [Job({"kind": "counts", "case": case}, names) for case in args.cases]
    jobs += [Job({"kind": "time", "case": case, "steps": loops.PERIOD, "teacher": False}, names) for case in args.cases]
    for path in write(measure(args, launches, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
