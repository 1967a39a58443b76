"""What the first call of a balancer costs, which proves that virtual passes are right, and what the later ones do.

    python benchmarks/first_call.py                    # all cases
    python benchmarks/first_call.py --preset smoke     # seconds: does it run?

Writes results.json and README.md to --output. The same command after an interruption goes on where it stopped. What
`notes.md` there says is put at the end of README.md. Needs `pip install -e ".[benchmarks]"`.
"""

import statistics
from pathlib import Path

from benchmarks.common import first
from benchmarks.common.cases import CASES
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.markdown import plain_milliseconds, provenance, table, what_failed, write_readme
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content, entries, find, ratios

PRESETS = {
    "full": {
        "cases": ["resnet8x4", "resnet20", "transformer", "mlp32"], "repeats": 8, "seconds": 240.0,
        "output": ROOT / "benchmarks" / "results" / "first_call",
    },
    "smoke": {
        "cases": ["convnet4"], "repeats": 2, "seconds": 5.0, "output": Path("runs") / "first-call-smoke",
    },
}  # fmt: skip

TEXT = """\
# The first call of a balancer

{provenance}

The first call with a hypergradient proves that virtual passes compute what real ones do; later calls do not.
`verify=False` leaves the proof out.

Times are those of a whole training iteration (the call, `zero_grad`, `backward`, the optimizer's step) over a plain
distillation iteration on the same batch; the teacher's outputs are given. The estimator is `OneStep()`, there are two
terms, and the meta batch is as large as the training batch. Each round builds new balancers, and times the first
iteration of each and {steady} more, with plain iterations before. Building is not timed. The first round is not
counted: torch loads some things late. A number is the median over the rounds, with the smallest and the largest behind
it.

{cases}

{times}
"""


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    cells = {case: find(content, kind="first", case=case) for case in entries(content, "case")}
    about = [
        [
            case,
            str(content["settings"]["batch_size"] or CASES[case].batch_size),
            plain_milliseconds([cell]),
            str(len(cell.get("rounds", []))),
        ]
        for case, cell in cells.items()
    ]
    times = [[case, *(times_of(ratios(cell, name)) for name in first.METHODS)] for case, cell in cells.items()]
    text = TEXT.format(
        provenance=provenance(content),
        steady=first.STEADY,
        cases=table(["case", "batch size", "plain iteration, ms: median (10 to 90 % of them)", "rounds"], about),
        times=table(["case", *first.METHODS], times),
    )
    return [write_readme(folder, text + what_failed(content, lambda cell: cell["case"]))]


def times_of(found: list[float]) -> str:
    """The median, with the smallest and the largest behind it."""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""


def main() -> None:
    """Measure the cells that are not in the record yet; then write the report."""
    args = parse(parser_of(__doc__, PRESETS, list(first.METHODS)), PRESETS)
    limits = {"repeats": args.repeats, "seconds": args.seconds}
    jobs = [Job({"kind": "first", "case": case, **limits}, list(first.METHODS)) for case in args.cases]
    for path in write(measure(args, first, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
