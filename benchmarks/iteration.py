"""What a training iteration with learned weights costs: time and memory of metakd and of its peers beside plain KD.

    python benchmarks/iteration.py                    # all CASES and METHODS
    python benchmarks/iteration.py --preset smoke     # seconds: does it run?
    python benchmarks/iteration.py --device cuda --clock device --methods "plain, CUDA graph" "plain, compiled"

Writes results.json, README.md and cost.png to --output. The same command after an interruption goes on where it
stopped. What `notes.md` there says is put at the end of README.md. Needs `pip install -e ".[benchmarks]"`.
"""

from pathlib import Path

from benchmarks import iteration_report as report
from benchmarks.common import loops
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.measure import ROOT

NAMES = [name for name in loops.METHODS if name != "plain"]
ALWAYS = [name for name in NAMES if name not in loops.MODES]
PRESETS = {
    "full": {
        "cases": ["resnet8x4", "resnet20", "transformer"], "repeats": 4,
        "seconds": 160.0, "output": ROOT / "benchmarks" / "results" / "iteration",
    },
    "smoke": {
        "cases": ["convnet4"], "repeats": 2, "seconds": 5.0, "output": Path("runs") / "iteration-smoke",
    },
}  # fmt: skip


def main() -> None:
    """Measure the cells that are not in the record yet, times first; then write the report."""
    parser = parser_of(__doc__, PRESETS, NAMES)
    parser.set_defaults(methods=ALWAYS)
    args = parse(parser, PRESETS)
    jobs = []
    for teacher, known in ((False, NAMES), (True, loops.WITH_TEACHER)):
        chosen = [name for name in args.methods if name in known]
        jobs += [Job({"kind": "time", **cell(case, teacher)}, ["plain", *chosen]) for case in args.cases if chosen]
    for case in args.cases:
        jobs += [Job({"kind": "memory", **cell(case), "method": name}) for name in ["plain", *args.methods]]
    for path in report.write(measure(args, loops, jobs).content, args.output):
        print(path)


def cell(case: str, teacher: bool = False) -> dict[str, object]:
    """What tells a cell from the others: its case, and whether its teacher runs in every iteration."""
    return {"case": case, "steps": loops.PERIOD, "teacher": teacher}


if __name__ == "__main__":
    run(main)
