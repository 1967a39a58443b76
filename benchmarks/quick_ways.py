"""The quick ways to a hypergradient: what they cost, how far off they are, and what a student makes of them.

    python benchmarks/quick_ways.py                    # all CASES and METHODS
    python benchmarks/quick_ways.py --preset smoke     # seconds: does it run?

Writes results.json, README.md and quick_ways.png to --output. The same command after an interruption goes on where it
stopped. What `notes.md` there says is put at the end of README.md. Where METAKD_CIFAR10 names a folder of CIFAR-10's
images, {train,test}/<class>/*, the errors of the networks for images are taken on those, and else on random inputs; the
accuracies are those of scikit-learn's digits. Needs `pip install -e ".[benchmarks,examples]"`.
"""

from pathlib import Path

from benchmarks import quick_ways_report as report
from benchmarks.common import quick
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.digits import DIGITS
from benchmarks.common.measure import ROOT

NAMES = list(quick.WAYS)
PRESETS = {
    "full": {
        "cases": ["resnet8x4", "resnet20", "transformer"], "repeats": 6, "seconds": 80.0, "after": 20,
        "seeds": [0, 1, 2, 3, 4], "epochs": DIGITS.epochs,
        "output": ROOT / "benchmarks" / "results" / "quick_ways",
    },
    "smoke": {
        "cases": ["convnet4"], "repeats": 2, "seconds": 5.0, "after": 2, "seeds": [0], "epochs": 2,
        "output": Path("runs") / "quick-ways-smoke",
    },
}  # fmt: skip


def main() -> None:
    """Measure the cells that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, NAMES)
    parser.add_argument("--after", type=int, help="plain iterations before the errors are taken a second time")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the accuracies")
    parser.add_argument("--epochs", type=int, help="of the accuracies")
    args = parse(parser, PRESETS)
    names = ["exact", *(name for name in args.methods if name != "exact")]
    jobs = [Job({"kind": "time", "case": case, "steps": 1, "teacher": False}, ["plain", *names]) for case in args.cases]
    jobs += [
        Job({"kind": "errors", "case": case, "after": after}, names[1:])
        for case in args.cases
        for after in (0, args.after)
    ]
    # The digits' student has two layers, so that its last stage and classifier are all there is.
    students = [name for name in names if name != "last stage and classifier"]
    jobs += [Job({"kind": "accuracy", "seed": seed, "epochs": args.epochs}, students) for seed in args.seeds]
    for path in report.write(measure(args, quick, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
