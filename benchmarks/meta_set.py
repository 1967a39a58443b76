"""How large must the meta set be, and how often must the weight model move? BiKD on the long-tailed digits.

    python benchmarks/meta_set.py                    # five seeds, ten minutes of one core
    python benchmarks/meta_set.py --preset smoke     # seconds: does it run?

Writes results.json, README.md and meta_set.png to --output, each seed as soon as it is there; the same command after an
interruption goes on where it stopped. What `notes.md` there says is put at the end of README.md. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

from pathlib import Path

from benchmarks import meta_set_report as report
from benchmarks.common import meta_sets
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.measure import ROOT

PRESETS = {
    "full": {
        "sizes": [1, 2, 5, 10, 20], "seeds": [0, 1, 2, 3, 4], "epochs": 100,
        "output": ROOT / "benchmarks" / "results" / "meta_set",
    },
    "smoke": {"sizes": [1, 3], "seeds": [0], "epochs": 2, "output": Path("runs") / "meta-set-smoke"},
}  # fmt: skip


def main() -> None:
    """Measure the seeds that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, meta_sets.NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, help="images of each class in the meta set")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="of the student")
    args = parse(parser, PRESETS)
    keys = [{"seed": seed, "epochs": args.epochs, "sizes": args.sizes} for seed in args.seeds]
    jobs = [Job({"kind": "accuracy", **key}, args.methods) for key in keys]
    jobs += [Job({"kind": "noise", **key}, ["bikd"]) for key in keys]
    for path in report.write(measure(args, meta_sets, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
