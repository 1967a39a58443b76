"""Unreliable sources, annotators, labels and teachers: what learned weights add, and what else would have done.

    METAKD_CIFAR10=data/cifar10 python benchmarks/unreliable.py --threads 1               # an hour of one core
    METAKD_CIFAR10=data/cifar10 python benchmarks/unreliable.py --preset cnn --threads 1  # convolutions: half an hour
    python benchmarks/unreliable.py --preset digits --threads 1                           # the second data set
    python benchmarks/unreliable.py --preset smoke                                        # seconds: does it run?

CIFAR-10 is read from the folder that METAKD_CIFAR10 or --data-root names: pictures in `{train,test}/<class>/*`, or
torchvision's files. Writes results.json and README.md to --output, each run as soon as it is there; the same command
after an interruption goes on where it stopped. What `notes.md` there says is put at the end of README.md. Needs
`pip install -e ".[benchmarks]"`.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.common.command import run
from benchmarks.common.measure import ROOT
from benchmarks.common.record import Record
from benchmarks.trust import report
from benchmarks.trust.presets import PRESETS
from benchmarks.trust.recipes import rows_of
from benchmarks.trust.run import Cell, failed, found_by
from benchmarks.trust.settings import SETTINGS, Where
from metakd import MetaKDError


def main() -> None:
    """Train the runs that are not in the record yet; then write the report."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    record = Record(args.output / "results.json", "cpu", {"threads": args.threads, "batch_size": preset.batch_size})
    where = Where(args.data_root, args.work)
    for meta in args.meta:
        for setting in args.settings:
            for seed in args.seeds:
                key = {"kind": "run", "setting": setting, "meta": meta, "seed": seed, "protocol": preset.protocol()}
                cell = None
                for row, variants in rows_of(setting, few=preset.few).items():
                    if args.rows and row not in args.rows:
                        continue
                    for recipe in variants:
                        own = {**key, "recipe": recipe.settings()}
                        if record.find(**own) is not None:
                            continue
                        cell = cell or Cell(setting, preset, meta, seed, where)
                        try:
                            found = found_by(cell, recipe)
                        except MetaKDError as error:
                            found = failed(error)
                        record.put({"row": row, **found}, **own)
                print(f"{setting}, {meta} meta images a class, seed {seed}", file=sys.stderr, flush=True)
    for path in report.write(record.content, args.output, preset):
        print(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small")
    add("--settings", nargs="+", choices=list(SETTINGS))
    add("--rows", nargs="+", metavar="ROW", help="rows of the table; default: all")
    add("--meta", nargs="+", type=int, help="images of each class in the meta set")
    add("--seeds", nargs="+", type=int)
    add("--data-root", type=Path, default=os.environ.get("METAKD_CIFAR10"))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--work", type=Path, default=Path("runs") / "unreliable", help="where the features are kept")
    add("--output", type=Path)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    args.settings = args.settings or list(preset.settings or SETTINGS)
    args.meta, args.seeds = args.meta or preset.metas, args.seeds or preset.seeds
    args.data_root = Path(args.data_root) if args.data_root and preset.dataset != "digits" else None
    folder = "unreliable" if args.preset == "small" else f"unreliable-{args.preset}"
    args.output = args.output or ROOT / "benchmarks" / "results" / folder
    return args


if __name__ == "__main__":
    run(main)
