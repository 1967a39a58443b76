"""What the benchmarks' commands share: their options, and the cells of a record measured one by one."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.common.cases import CASES
from benchmarks.common.measure import in_process
from benchmarks.common.record import Record
from metakd import MetaKDError

Presets = Mapping[str, Mapping[str, Any]]


class Job(NamedTuple):
    """A cell to measure.

    Attributes:
        key: its kind, its case and all else that tells it from the others.
        methods: the names of those to measure; for a cell of memory its key has the one.
    """

    key: dict[str, Any]
    methods: Sequence[str] = ()


def parser_of(description: str | None, presets: Presets, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has; `methods` are the names to choose from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(presets), default="full")
    add("--cases", nargs="+", choices=list(CASES))
    add("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD", help=", ".join(methods))
    add("--repeats", type=int, help="most rounds of a cell: in a round every method is timed once")
    add("--seconds", type=float, help="no new round of a cell starts after so many; each has at least one")
    add("--batch-size", type=int, help="default: 100 images, 32 sequences")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's choice, here %(default)s")
    add("--clock", choices=["wall", "cpu", "device"], default="wall",
        help="cpu: one thread's own time, on a busy machine; device: the GPU's own, by events")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--output", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser, presets: Presets) -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    args = parser.parse_args()
    for key, value in presets[args.preset].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.clock == "cpu" and (args.threads > 1 or args.device == "cuda"):
        parser.error("--clock cpu is for one thread of the CPU: it adds up the time of several, and misses a GPU's")
    if args.clock == "device" and args.device != "cuda":
        parser.error("--clock device is for --device cuda")
    return args


def measure(args: argparse.Namespace, methods: ModuleType, jobs: Iterable[Job]) -> Record:
    """Measure the cells that the record in --output lacks; a time cell that lacks a method is measured again."""
    from tqdm import tqdm  # what else is here does without

    settings = {"threads": args.threads, "batch_size": args.batch_size}
    if args.clock != "wall":
        settings["clock"] = args.clock
    record = Record(args.output / "results.json", args.device, settings)
    common = {"module": methods.__name__, "device": args.device, **settings}
    limits = {"repeats": args.repeats, "seconds": args.seconds}
    for key, names in (bar := tqdm(list(jobs), mininterval=0.1 if sys.stderr.isatty() else 60)):
        bar.set_description(", ".join(f"{name} {value}" for name, value in key.items()), refresh=sys.stderr.isatty())
        old = record.find(**key)
        if key["kind"] == "memory":
            if old is None:
                record.put(in_process(**key, **common), **key)
            continue
        if key["kind"] != "time":
            if old is None or not set(names) <= set(old["methods"]):
                record.put({"methods": list(names), **in_process(**key, **common, methods=list(names))}, **key)
            continue
        known = {*old["rounds"][0], *old["failed"]} if old else set()
        if not set(names) <= known:
            chosen = [name for name in methods.METHODS if name in known or name in names]
            record.put(in_process(**key, **common, **limits, methods=chosen), **key)
    return record


def run(main: Callable[[], None]) -> None:
    """Run a command and say in one line why it ended early."""
    try:
        main()
    except MetaKDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on where it stopped")
