"""Runs tests on a GPU and keeps what became of each, line by line; a second run leaves out what has been run.

    python -m benchmarks.gpu.tests --output OUT --only-gpu                        # those that skip without a GPU
    python -m benchmarks.gpu.tests --output OUT --device cuda tests/estimators    # tensors on the GPU by default

OUT.jsonl has one line a test, OUT.json the numbers and the failures.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.measure import ROOT
from benchmarks.gpu.jobs import UNFINISHED
from metakd.longtail.checkpoint import write_atomically

NEEDS_GPU = re.compile(r"needs a GPU")
OPTIONS = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
ON_DEVICE = (".*on CUDA torch's own kernels have second derivatives", "Sparse invariant checks")
"""Warnings on a GPU, and nowhere else, which tests written for a CPU do not expect."""
OF_THE_CPU = {
    "test_the_numbers_of_layer_norm": "numbers that the CPU's generator drew",
    "test_they_are_finite_differences[det-": "matrices that the GPU's generator draws are nearly singular",
    "weight_norm": "differences of the GPU's kernel are rough, also in float64; test_gpu.py has it",
    "before_it[lstm": "cuDNN's has no double backward, which a function of one's own is told",
    "before_it[gru": "likewise",
    "before_it[rnn": "likewise",
    "test_two_threads_take_turns": "the default device is one thread's",
    "test_fused_attention_fails_by_name": "the kernel that it asks for is the CPU's",
    "test_reverse_mode_does": "with a default device torch calls its functions twice",
    "[Adjoint(mode='forward', offload=None)": "torch's dropout on a GPU has no forward mode in its backward pass",
}
"""Tests that mean the CPU, and why."""
DRAWS = ("rand", "randn", "randint", "randperm", "normal")


class Keeper:
    """A plugin of pytest that chooses the tests and keeps their outcomes."""

    def __init__(self, output: Path, only_gpu: bool, until: float | None, part: slice = slice(None)) -> None:
        self.lines, self.only_gpu, self.until, self.part = output.with_suffix(".jsonl"), only_gpu, until, part
        self.known = read(self.lines)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out other parts, what has been run, and what does not need a GPU or is about the CPU."""
        asked = [item for item in items if needs_gpu(item) or not (self.only_gpu or of_the_cpu(item))][self.part]
        chosen = [item for item in asked if item.nodeid not in self.known]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._keep(report.nodeid, "error", report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has ended, or a part of it has failed."""
        if report.when == "call" or report.outcome != "passed":
            self._keep(report.nodeid, report.outcome, report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Stop between two tests when the time is over."""
        if self.until is not None and time.monotonic() > self.until:
            item.session.shouldstop = "out of time"

    def _keep(self, name: str, outcome: str, report: Any) -> None:
        entry = {"test": name, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 2)}
        if outcome != "passed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            entry["why"] = text[-600:]
        with self.lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def needs_gpu(item: pytest.Item) -> bool:
    """Whether a test is skipped without a GPU."""
    return any(NEEDS_GPU.search(str(mark.kwargs.get("reason", ""))) for mark in item.iter_markers("skipif"))


def of_the_cpu(item: pytest.Item) -> bool:
    """Whether a test is about the CPU alone, see `OF_THE_CPU`."""
    return any(name in item.nodeid for name in OF_THE_CPU)


def files_of(root: Path = ROOT) -> list[str]:
    """The test files that have tests for a GPU."""
    found = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in found if NEEDS_GPU.search(path.read_text())]


def read(lines: Path) -> dict[str, dict[str, Any]]:
    """The outcomes so far; what was skipped, or could not be imported, is tried again."""
    if not lines.exists():
        return {}
    found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    return {entry["test"]: entry for entry in found if entry["outcome"] in ("passed", "failed")}


def use(device: str) -> None:
    """Tensors are made on a device by default; where a CPU generator draws them, there, and then moved."""
    torch.set_default_device(device)
    for name in DRAWS:
        setattr(torch, name, _drawn_on_its_device(getattr(torch, name), device))


def _drawn_on_its_device(draw: Callable[..., Any], device: str) -> Callable[..., Any]:
    @wraps(draw)
    def drawn(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if generator is None:
            return draw(*args, **{"device": device, **kwargs})
        if "device" in kwargs or generator.device.type == device:
            return draw(*args, generator=generator, **{"device": device, **kwargs})
        wanted = bool(kwargs.pop("requires_grad", False))
        return draw(*args, **kwargs, generator=generator, device=generator.device).to(device).requires_grad_(wanted)

    return drawn


def summarise(output: Path) -> dict[str, Any]:
    """Write the numbers and what failed."""
    entries = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    last = {entry["test"]: entry for entry in entries}
    found = {
        "outcomes": Counter(entry["outcome"] for entry in last.values()),
        "seconds": round(sum(entry["seconds"] for entry in last.values()), 1),
        "not passed": {name: entry["why"] for name, entry in last.items() if entry["outcome"] != "passed"},
    }
    write_atomically(output.with_suffix(".json"), lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    return found


def main() -> int:
    """Run the tests; the exit status says whether all had their turn, not whether they passed."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only-gpu", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--until", type=float)
    parser.add_argument("--part", type=int, default=0, help="of --parts")
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".jsonl").touch()
    if args.device and args.device != "cpu":
        use(args.device)
    until = None if args.until is None else start + args.until
    keeper = Keeper(args.output, args.only_gpu, until, slice(args.part, None, args.parts))
    paths = args.paths or files_of()
    elsewhere = [option for words in ON_DEVICE for option in ("-W", f"ignore:{words}")] if args.device else []
    status = pytest.main([*OPTIONS, *elsewhere, "-o", "addopts=", *paths], plugins=[keeper])
    print(json.dumps(summarise(args.output)["outcomes"]))
    if status == pytest.ExitCode.INTERRUPTED:
        return UNFINISHED
    return 0 if status in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED) else int(status)


if __name__ == "__main__":
    sys.exit(main())
