"""Makes the most of some minutes with a GPU: tests, cost and the paper's table, in order of worth, without a network.

    python benchmarks/on_gpu.py --minutes 9 --data carried            # carried/cifar10/index.json: mosaics
    python benchmarks/on_gpu.py --list                                # what there is to do, and what became of it
    python benchmarks/on_gpu.py --plan smoke --device cpu --minutes 5 # a rehearsal
    python benchmarks/on_gpu.py --plan choice --data carried          # candidates, on images set aside for a choice
    python benchmarks/on_gpu.py --plan small --data carried --methods best+val mixture+val --seeds 0 1 2

Each job is a process with a time limit. What it finds is written to --output as it goes. The same command goes on where
it stopped: done jobs are not done again, a network's training goes on from its checkpoint in --work, and trained
teachers are kept in --output. What failed, or ran too long, is tried again after all others.
`python -m benchmarks.longtail.mosaics` makes the mosaics.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.common.command import run
from benchmarks.common.measure import ROOT
from benchmarks.gpu.log import Log
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.table import Small, Table
from benchmarks.gpu.work import Work
from benchmarks.longtail import methods
from benchmarks.longtail.candidates import CHOICE
from benchmarks.longtail.presets import PRESETS
from metakd import MetaKDError

DEFAULTS = {"small": ("best+val", "best", "mixture+val", "mixture"), "choice": CHOICE}
"""The plans of many small students, and their methods."""
RESULTS = ROOT / "benchmarks" / "results" / "gpu"


def plan_of(args: argparse.Namespace) -> Plan | Small:
    """The whole plan, a rehearsal of it in small, or many small students."""
    if args.plan in DEFAULTS:
        preset = PRESETS[args.preset or args.plan]
        dataset = preset.datasets[0]
        return Small(
            Table(args.preset or args.plan, args.device, args.output, args.work / "table" / args.plan, args.data, 15.0),
            dataset,
            args.imbalances or ((50.0, 100.0) if dataset == "cifar10" else preset.imbalances),
            args.seeds or preset.seeds,
            args.methods or DEFAULTS[args.plan],
            args.cells,
        )
    if args.plan == "full":
        return Plan(args.device, args.output, args.work, args.data)
    return Plan(
        args.device,
        args.output,
        args.work,
        args.data,
        tests=["tests/estimators/test_softmax.py"],
        gpu_tests=["tests/test_history.py"],
        cases=["convnet4"],
        overhead=["convnet4"],
        loops=["accumulate=1"],
        graphs=["plain, CUDA graph"],
        compiled=["plain, compiled"],
        batches=[4],
        adjoint="convnet4",
        steps=[1, 2],
        tables=[("digits", 20.0, (0,)), ("digits", 20.0, (1,))],
        preset="smoke",
        methods=["kd", "bikd-mix"],
        seconds=1.0,
        scale=5.0,  # a slow machine that does other things as well
    )


def main() -> None:
    """Do the jobs, or list them."""
    args = parse_arguments()
    start = time.time()
    jobs = plan_of(args).jobs()
    if args.jobs:
        if unknown := sorted({*args.jobs} - {job.name for job in jobs}):
            raise MetaKDError(f"there are no jobs {', '.join(unknown)}; there are {', '.join(j.name for j in jobs)}")
        jobs = [job for job in jobs if job.name in args.jobs]
    log = Log(ROOT / args.output / "jobs.json", minutes=args.minutes, device=args.device)
    if args.list:
        for job in jobs:
            entry = log.of(job.name)
            need = f"about {job.need:.0f} s" if job.need else f"at most {job.limit:.0f} s"
            print(f"{entry.get('status', 'to do'):8}{job.name:32}{need:18}{entry.get('reason', '')}")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MetaKDError("torch finds no GPU; a rehearsal is --plan smoke --device cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are ended, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log.save()
    seconds = 60 * args.minutes - (time.time() - start)
    work = Work(
        jobs, log, seconds, together=args.together, scratch=ROOT / args.work / "output", travels=args.travels, say=say
    )  # fmt: skip
    try:
        work.all()
    finally:
        log.run["seconds"] = round(time.time() - start, 1)
        log.save()


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="of the whole run")
    add("--plan", choices=["full", "smoke", *DEFAULTS], default="full")
    few = parser.add_argument_group("of the plans small and choice")
    few.add_argument("--methods", nargs="+", metavar="METHOD", help="in the order of worth")
    few.add_argument("--seeds", nargs="+", type=int)
    few.add_argument("--imbalances", nargs="+", type=float)
    few.add_argument("--preset", choices=list(PRESETS), help="another one than the plan's, for a rehearsal")
    few.add_argument("--cells", type=int, default=2, help="methods that one job trains, one after another")
    add("--jobs", nargs="+", metavar="JOB", help="only these, see --list")
    add("--list", action="store_true", help="say what became of the jobs, and do none")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--data", type=Path, default=os.environ.get("METAKD_MOSAICS"), help="folder of the images; or METAKD_MOSAICS")
    add("--together", type=int, help="students that are trained side by side, each a process: 4, if they are small 14")
    add(
        "--travels",
        type=float,
        default=float("inf"),
        metavar="MB",
        help="the largest checkpoint that reaches the next run; a job with a larger one is done at once or not at all",
    )
    add("--output", type=Path, help="default: benchmarks/results/gpu, for many small students a folder in it")
    add("--work", type=Path, default=Path("runs") / "gpu", help="checkpoints and the jobs' output")
    args = parser.parse_args()
    small = args.plan in DEFAULTS
    if not small and (args.methods or args.seeds or args.imbalances or args.preset):
        parser.error("--methods, --seeds, --imbalances and --preset are for the plans small and choice")
    for name in args.methods or ():
        methods.find(name)  # raises
    args.output = args.output or (RESULTS / args.plan if small else RESULTS)
    args.together = args.together or (14 if small else 4)
    for key in ("data", "output", "work"):
        if getattr(args, key) is not None:  # the jobs run in the repository, and records hold their commands
            setattr(args, key, Path(os.path.relpath(getattr(args, key), ROOT)))
    return args


if __name__ == "__main__":
    run(main)
