"""The benchmarks of launches and of the steps' order: what they count, and what their reports say."""

import subprocess
import sys

import pytest

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import order, overhead
from benchmarks.common import loops
from benchmarks.common.launches import METHODS, count_cell
from benchmarks.common.measure import ROOT

EVERY = f"every={loops.PERIOD}"
ABOUT = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}


def content(cells, **settings):
    settings = {"device": "cpu", "threads": 1, "batch_size": None, "clock": "cpu"} | settings
    return {"command": "python", "environment": ABOUT, "settings": settings, "cells": cells}


@pytest.mark.slow
def test_kernels_and_syncs_are_counted_for_every_method():
    cell = {"case": "convnet4", "batch_size": 4, "device": "cpu", "methods": [*METHODS]}
    found = count_cell(cell)
    assert not found["failed"] and list(found["counts"]) == [*METHODS]
    counts = found["counts"]
    assert counts["plain"]["syncs"] == 0 and counts["accumulate=1"]["syncs"] == 1
    kernels = {name: one["kernels"] for name, one in counts.items()}
    assert kernels["plain"] < kernels[EVERY] < kernels["simultaneous"] < kernels["accumulate=1"]
    assert sum(counts["plain"]["operations"].values()) <= kernels["plain"]


def test_the_report_judges_the_counts_by_the_goals(tmp_path):
    counts = {"plain": 10, "accumulate=1": 39, EVERY: 20}
    cell = {
        "kind": "counts", "case": "mlp32", "failed": {},
        "counts": {name: {"kernels": n, "syncs": float(name != "plain")} for name, n in counts.items()},
    }  # fmt: skip
    (readme,) = overhead.write(content([cell]), tmp_path)
    text = readme.read_text()
    assert "| accumulate=1 | 39 (3.90) |" in text and "| accumulate=1 | 1 |" in text
    assert "| kernels, `accumulate=1`, at most 4.0 times plain | met: 3.90 on mlp32 |" in text
    assert f"| kernels, `{EVERY}`, at most 1.6 times plain | missed by 25.0 %: 2.00 on mlp32 |" in text


def test_the_orders_are_compared_seed_by_seed(tmp_path):
    cells = [
        {
            "kind": "accuracy", "seed": seed, "epochs": 3, "failed": {},
            "accuracy": {
                "sequential, k = 1": 90.0, "simultaneous, k = 1": 91.0 + 2 * seed,
                "sequential, k = 5": 90.0, "simultaneous, k = 5": 90.0,
            },
        }
        for seed in (0, 1)
    ]  # fmt: skip
    (readme,) = order.write(content(cells), tmp_path)
    text = readme.read_text()
    assert "| 1 | 90.00 ± 0.00 | 92.00 ± 1.41 | 2.00 ± 1.41 |" in text and "over 2 seeds" in text


@pytest.mark.slow
def test_the_order_is_measured(tmp_path):
    pytest.importorskip("sklearn")  # of the extra "examples"
    line = [sys.executable, "benchmarks/order.py", "--preset", "smoke", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 5 | " in (tmp_path / "README.md").read_text()
