"""Weights by the exact hypergradient of the final meta loss through a whole training, beside one step ahead.

    python benchmarks/whole_training.py --threads 1 --clock cpu      # ten minutes of one core
    python benchmarks/whole_training.py --preset smoke               # seconds: does it run?

Writes results.json and README.md to --output, each cell as soon as it is there; the same command after an interruption
goes on where it stopped. What `notes.md` there says is put at the end of README.md. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

from pathlib import Path

from benchmarks.common import whole
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.course import ACTIVATIONS, GROUPS
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content

PRESETS = {
    "full": {
        "tasks": list(GROUPS), "students": list(ACTIVATIONS), "seeds": [0, 1, 2], "steps": 300,
        "output": ROOT / "benchmarks" / "results" / "whole_training",
    },
    "smoke": {
        "tasks": ["sources"], "students": ["ReLU"], "seeds": [0], "steps": 6,
        "output": Path("runs") / "whole-training-smoke",
    },
}  # fmt: skip


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    return []


def main() -> None:
    """Measure the cells that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, list(whole.METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(GROUPS))
    parser.add_argument("--students", nargs="+", choices=list(ACTIVATIONS), help="by their activation")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="of the training")
    args = parse(parser, PRESETS)
    keys = [
        {"task": task, "student": student, "seed": seed, "steps": args.steps}
        for task in args.tasks for student in args.students for seed in args.seeds
    ]  # fmt: skip
    jobs = [Job({"kind": "cost", **key}) for key in keys if key["seed"] == args.seeds[0]]
    jobs += [Job({"kind": "accuracy", **key}, args.methods) for key in keys]
    jobs += [Job({"kind": "smooth", **key}) for key in keys]
    for path in write(measure(args, whole, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
