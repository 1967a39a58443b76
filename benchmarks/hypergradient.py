"""What a hypergradient costs: time and memory of metakd's estimators, of its peers, and of a plain training step.

    python benchmarks/hypergradient.py                    # the whole grid: CASES x METHODS x K = 1, 2, 5, 10, 20
    python benchmarks/hypergradient.py --preset smoke     # seconds: does it run?

Writes results.json, README.md and cost.png to --output. The same command after an interruption goes on where it
stopped. What `notes.md` there says is put at the end of README.md. Needs `pip install -e ".[benchmarks]"`.
"""

from pathlib import Path

from benchmarks import hypergradient_report as report
from benchmarks.common import methods
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.measure import ROOT

NAMES = [name for name in methods.METHODS if name != "plain"]
PRESETS = {
    "full": {
        "cases": ["resnet8x4", "resnet20", "transformer", "lstm"], "steps": [1, 2, 5, 10, 20], "repeats": 5,
        "seconds": 30.0, "output": ROOT / "benchmarks" / "results" / "hypergradient",
    },
    "smoke": {
        "cases": ["convnet4"], "steps": [1, 2], "repeats": 2,
        "seconds": 5.0, "output": Path("runs") / "hypergradient-smoke",
    },
}  # fmt: skip


def main() -> None:
    """Measure the cells that are not in the record yet, times first; then write the report."""
    parser = parser_of(__doc__, PRESETS, NAMES)
    parser.add_argument("--steps", nargs="+", type=int, metavar="K", help="numbers of inner steps")
    args = parse(parser, PRESETS)
    grid = [{"case": case, "steps": steps} for case in args.cases for steps in sorted(args.steps)]
    first = [{"case": case, "steps": min(args.steps)} for case in args.cases]
    jobs = [Job({"kind": "time", **cell}, ["plain", *fitting(args.methods, cell["steps"])]) for cell in grid]
    jobs += [Job({"kind": "memory", **cell, "method": "plain"}) for cell in first]
    for cell in grid:
        jobs += [Job({"kind": "memory", **cell, "method": name}) for name in fitting(args.methods, cell["steps"])]
    for path in report.write(measure(args, methods, jobs).content, args.output):
        print(path)


def fitting(names: list[str], steps: int) -> list[str]:
    """The methods that take so many inner steps."""
    return [name for name in names if steps == 1 or name not in methods.ONE_STEP]


if __name__ == "__main__":
    run(main)
