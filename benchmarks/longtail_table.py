"""The long-tailed table: any set of {data set} x {imbalance} x {method} x {seed}, with the controls beside the claims.

    python benchmarks/longtail_table.py --preset smoke
    python benchmarks/longtail_table.py --preset small --data-root data
    python benchmarks/longtail_table.py --preset paper --device cuda --methods bikd best --seeds 0 1 2

Each cell is one training run: a JSON file, written once it is done. The same command goes on where it stopped, inside
a run too; other cells join the same table. Test images decide nothing: the accuracy is the last epoch's. A method's
name may end in a control: `kd+val` has the validation images among its training images, and `best+val` as well, whose
meta images they stay; `best+half` has half of them, the others are its meta images. `bikd+frozen` keeps the weight
model at its start, `bikd+permuted` gives each sample another one's weights, `bikd+mean` gives all samples
their mean over the last epoch.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.common.command import run
from benchmarks.common.measure import ROOT
from benchmarks.longtail import cost, methods, report
from benchmarks.longtail.fit import Unfinished
from benchmarks.longtail.presets import PRESETS
from benchmarks.longtail.train import Cell, Where, settings_of, student_of, teacher_of
from metakd import MetaKDError
from metakd.longtail import provenance
from metakd.longtail.checkpoint import write_atomically

UNFINISHED = 75
"""The exit status of a command that goes on later; EX_TEMPFAIL of sysexits.h."""


def main() -> None:
    """Train the cells that are not there yet, then write the table."""
    args = parse_arguments()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    chosen = {name: methods.find(name) for name in args.methods}
    until = None if args.until is None else start + args.until
    where = Where(args.data_root, args.image_folder, args.work, args.device, args.fast, args.teachers, until)
    if args.fast:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions have anyway
    cells = [
        Cell(dataset, imbalance, method, seed)
        for seed in args.seeds
        for dataset in args.datasets
        for imbalance in args.imbalances
        for method in chosen
    ]
    if not cells and args.teachers:
        for seed in args.seeds:
            for dataset in args.datasets:
                for imbalance in args.imbalances:
                    teacher_of(Cell(dataset, imbalance, "teacher", seed), preset, where)
    failed: list[str] = []
    for number, cell in enumerate(() if args.cost else cells, 1):
        path = args.output / "cells" / f"{cell.name}.json"
        if path.exists():
            continue
        print(f"{number}/{len(cells)} {cell.name}", file=sys.stderr, flush=True)
        method = chosen[cell.method]
        try:
            result = student_of(cell, preset, where, method)
        except (MetaKDError, RuntimeError):  # other cells have their turn all the same
            traceback.print_exc()
            failed.append(cell.name)
            continue
        found = {
            "settings": settings_of(cell, preset, method),
            **provenance(),
            "device": args.device,
            "fast": args.fast,
            **result,
        }
        text = json.dumps(found) + "\n"
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        if args.teachers:
            where.checkpoint_of(cell.name).unlink(missing_ok=True)
        scores = result["test"]
        print(f"  {scores['overall']:.2f} ({scores['few']:.2f} few), {result['seconds']:.0f} s", file=sys.stderr)
    if args.cost:
        cell = Cell(args.datasets[0], args.imbalances[0], "kd", args.seeds[0])
        found = {**provenance(), "device": args.device, **cost.measure(cell, list(chosen), preset, where)}
        write_atomically(args.output / "cost.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    for path in () if args.no_report else report.write(args.output, preset):
        print(path)
    if failed:
        raise MetaKDError(f"there is an error above for each of {', '.join(failed)}; all other cells are done")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small")
    add(
        "--methods",
        nargs="*",
        default=list(methods.TABLE),
        metavar="METHOD",
        help=", ".join(methods.METHODS) + "; none: only the teachers in --teachers, and the table",
    )
    add("--datasets", nargs="+", choices=["digits", "cifar10", "cifar100"])
    add("--imbalances", nargs="+", type=float)
    add("--seeds", nargs="+", type=int)
    add("--data-root", type=Path, help="where the images are, or to download them to")
    add("--image-folder", action="store_true", help="--data-root holds <dataset>/{train,test}/<class>/*")
    add("--cost", action="store_true", help="measure the methods' time and memory instead of training")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--work", type=Path, help="checkpoints; default: runs/longtail-<preset>")
    add("--output", type=Path, help="default: benchmarks/results/longtail-<preset>")
    add(
        "--fast",
        action="store_true",
        help="CUDA graphs where the weights are fixed, TF32, the teacher's passes in bfloat16",
    )
    add("--teachers", type=Path, help="keep trained teachers there, in eight bits, and no checkpoint of what is done")
    add("--until", type=float, metavar="SECONDS", help=f"stop in time, with exit status {UNFINISHED}, and go on later")
    add("--no-report", action="store_true", help="write cells only, no table")
    args = parser.parse_args()
    for key in ("datasets", "imbalances", "seeds"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(PRESETS[args.preset], key))
    args.work = args.work or Path("runs") / f"longtail-{args.preset}"
    args.output = args.output or ROOT / "benchmarks" / "results" / f"longtail-{args.preset}"
    return args


if __name__ == "__main__":
    try:
        run(main)
    except Unfinished as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(UNFINISHED)
