"""Seconds of each training of the paper's table on a GPU, on paper: from operations that are counted here, on the CPU.

    python -m benchmarks.gpu.estimate

Counts floating-point operations an image and kernels an iteration, of real iterations on a few random images. `RATES`
says what a GPU is assumed to do. Writes estimate.json to benchmarks/results/gpu and prints the table.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.counts import count
from benchmarks.common.markdown import table
from benchmarks.common.measure import ROOT
from benchmarks.longtail import methods, steps
from benchmarks.longtail.fixed import Fixed
from benchmarks.longtail.presets import PRESETS
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.train import TEACHER, optimizer_of
from metakd.longtail import build_model, long_tail_counts
from metakd.longtail.checkpoint import write_atomically

PATH = ROOT / "benchmarks" / "results" / "gpu" / "estimate.json"
PAPER = PRESETS["paper"]
NAMES = ("teacher", "kd", "mixture", "bikd-mix", "best")
SIZES = {("cifar10", 50.0): (10, 4900), ("cifar100", 100.0): (100, 490)}
"""Data set and imbalance -> classes and the largest class."""
BATCH = 4


class Rates(NamedTuple):
    """What is assumed of a GPU (an H100 or its like): a few per cent of the peak, for the networks are narrow."""

    tf32: float = 60e12
    """Operations a second in TF32."""
    bf16: float = 100e12
    """In bfloat16."""
    launch: float = 12e-6
    """Seconds to launch a kernel from Python; several students side by side share the GPU, but not this."""
    replay: float = 2.5e-6
    """Seconds that a kernel takes at least in a CUDA graph."""


RATES = Rates()


class Counted(NamedTuple):
    """Operations an image in the student's precision and in the teacher's, and kernels an iteration."""

    tf32: float
    bf16: float
    kernels: int


def counted(name: str, classes: int) -> Counted:
    """Count an iteration of the method; of "teacher", of the teacher's own training."""
    torch.manual_seed(0)
    alone = name == "teacher"
    teacher = _network(PAPER.teacher, classes)
    with FlopCounterMode(display=False) as once:
        teacher.eval()(_images())
    student = _network(PAPER.teacher if alone else PAPER.student, classes).train()
    optimizer = optimizer_of(student, PAPER)
    optimizer.param_groups[0]["foreach"] = True  # as on a GPU
    passes = 0

    def taught(inputs: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        with torch.no_grad():
            logits: Tensor = teacher(inputs)
        return logits

    setting = Setting(
        student, nn.Identity() if alone else taught, optimizer, tuple(range(500, 500 - classes, -1)), PAPER
    )
    objective = (TEACHER if alone else methods.find(name))(setting)
    training = steps.as_written(objective, optimizer, 0, _items(classes), _items(classes))
    for _ in range(2):  # the first calls prove the virtual passes
        next(training)
    passes = 0
    with FlopCounterMode(display=False) as whole:
        next(training)
    of_teacher = whole.get_total_flops() if alone else passes * once.get_total_flops()
    kernels = sum(count(lambda: next(training)).kernels.values())
    return Counted((whole.get_total_flops() - of_teacher) / BATCH, of_teacher / BATCH, kernels)


def _network(name: str, classes: int) -> nn.Module:
    return build_model(name, classes=classes)


def _images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32)


def _items(classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    while True:
        yield _images(), torch.randint(classes, (BATCH,)), torch.arange(BATCH)


def iterations(name: str, images: int) -> int:
    """Of a whole training."""
    preset = PAPER.of_teacher() if name == "teacher" else PAPER
    return preset.epochs * (images // preset.batch_size)


def seconds_of_iteration(name: str, found: Counted, rates: Rates = RATES) -> float:
    """Operations and the kernels' least time in a CUDA graph; else the longer one of operations and launches."""
    batch = PAPER.teacher_batch_size if name == "teacher" else PAPER.batch_size
    operations = batch * (found.tf32 / rates.tf32 + found.bf16 / rates.bf16)
    if name == "teacher" or isinstance(methods.find(name), Fixed):
        return operations + found.kernels * rates.replay
    return max(operations, found.kernels * rates.launch)


def estimated() -> list[dict[str, Any]]:
    """One row for each training."""
    rows = []
    for (dataset, imbalance), (classes, largest) in SIZES.items():
        images = sum(long_tail_counts(classes, largest, imbalance))
        for name in NAMES:
            found = counted(name, classes)
            steps, each = iterations(name, images), seconds_of_iteration(name, found)
            about = {"dataset": dataset, "imbalance": imbalance, "name": name, **found._asdict()}
            rows.append({**about, "iterations": steps, "ms": round(1e3 * each, 2), "seconds": round(steps * each)})
    return rows


@cache
def known() -> dict[tuple[str, float, str], float]:
    """Data set, imbalance and "teacher" or method -> estimated seconds, as the command has written them."""
    rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    return {(row["dataset"], row["imbalance"], row["name"]): row["seconds"] for row in rows}


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    head = ["training", "GFLOP/image, TF32", "bfloat16", "kernels", "iterations", "ms each", "seconds"]
    return table(
        head,
        [
            [
                f"{row['dataset']}-LT {row['imbalance']:g}, {row['name']}", f"{row['tf32'] / 1e9:.2f}",
                f"{row['bf16'] / 1e9:.2f}", str(row["kernels"]), f"{row['iterations']:,}", f"{row['ms']:.1f}",
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Count, write and print."""
    torch.set_num_threads(1)
    found = {"rates": RATES._asdict(), "rows": estimated()}
    write_atomically(PATH, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    print(text_of(found["rows"]))


if __name__ == "__main__":
    main()
