"""What a hypergradient costs: time and memory of metakd's estimators, of its peers, and of a plain training step.

    python benchmarks/hypergradient.py                    # the whole grid: CASES x METHODS x K = 1, 2, 5, 10, 20
    python benchmarks/hypergradient.py --preset smoke     # seconds: does it run?

Writes results.json, README.md and cost.png to --output. The same command after an interruption goes on where it
stopped. What `notes.md` there says is put at the end of README.md. Needs `pip install -e ".[benchmarks]"`.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import hypergradient_report as report
from benchmarks.common import methods
from benchmarks.common.cases import CASES
from benchmarks.common.measure import ROOT, in_process
from benchmarks.common.record import Record
from metakd import MetaKDError

NAMES = [name for name in methods.METHODS if name != "plain"]
PRESETS = {
    "full": {
        "cases": [name for name in CASES if name != "convnet4"], "steps": [1, 2, 5, 10, 20], "repeats": 5,
        "seconds": 30.0, "output": ROOT / "benchmarks" / "results" / "hypergradient",
    },
    "smoke": {
        "cases": ["convnet4"], "steps": [1, 2], "repeats": 2,
        "seconds": 5.0, "output": Path("runs") / "hypergradient-smoke",
    },
}  # fmt: skip


def main() -> None:
    """Measure the cells that are not in the record yet, times first; then write the report."""
    args = parse_arguments()
    settings = {"threads": args.threads, "batch_size": args.batch_size}
    record = Record(args.output / "results.json", args.device, settings)
    common = {"module": methods.__name__, "device": args.device, **settings}
    grid = [(case, steps) for case in args.cases for steps in sorted(args.steps)]
    jobs = [("time", case, steps, "") for case, steps in grid]
    jobs += [("memory", case, min(args.steps), "plain") for case in args.cases]
    jobs += [("memory", case, steps, name) for case, steps in grid for name in args.methods if fits(name, steps)]
    for kind, case, steps, name in (bar := tqdm(jobs, mininterval=0.1 if sys.stderr.isatty() else 60)):
        bar.set_description(f"{kind} {case} K={steps} {name}", refresh=sys.stderr.isatty())
        key = {"kind": kind, "case": case, "steps": steps} | ({"method": name} if name else {})
        old = record.find(**key)
        if kind == "memory":
            if old is None:
                record.put(in_process(**key, **common), **key)
            continue
        known = {*old["rounds"][0], *old["failed"]} if old else set()
        wanted = {"plain", *(method for method in args.methods if fits(method, steps))}
        if not wanted <= known:
            chosen = [method for method in methods.METHODS if method in wanted | known]
            limits = {"repeats": args.repeats, "seconds": args.seconds}
            record.put(in_process(**key, **common, **limits, methods=chosen), **key)
    for path in report.write(record.content, args.output):
        print(path)


def fits(method: str, steps: int) -> bool:
    """Whether a method takes so many inner steps."""
    return steps == 1 or method not in methods.ONE_STEP


def parse_arguments() -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="full")
    add("--cases", nargs="+", choices=list(CASES))
    add("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="METHOD", help=", ".join(NAMES))
    add("--steps", nargs="+", type=int, metavar="K", help="numbers of inner steps")
    add("--repeats", type=int, help="most rounds of a cell: in a round every method is timed once")
    add("--seconds", type=float, help="no new round of a cell starts after so many; each has at least one")
    add("--batch-size", type=int, help="default: 100 images, 32 sequences")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's choice, here %(default)s")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--output", type=Path)
    args = parser.parse_args()
    for key, value in PRESETS[args.preset].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


if __name__ == "__main__":
    try:
        main()
    except MetaKDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on where it stopped")
