"""The benchmark of the quick ways: each asks for what its name says; the report says what was measured."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import quick_ways_report
from benchmarks.common.measure import ROOT
from benchmarks.common.methods import METHODS
from benchmarks.common.quick import METHODS as ITERATIONS
from benchmarks.common.quick import WAYS, hypergradient, smaller
from metakd.estimators.subset import matching
from tests.benchmarks.problems import task
from tests.slow import slow_but

SMOKE = ["--preset", "smoke", "--threads", "1", "--clock", "cpu", "--methods", "classifier", "one-sided difference"]


@pytest.mark.parametrize("case", slow_but(["convnet4"], ["convnet4", "resnet20", "transformer"]))
def test_the_ways_are_as_far_off_as_they_must_be(case):
    at = task(case, 1)
    right = torch.cat([g.flatten() for g in METHODS["by hand"](at)()])
    off = {
        name: float((hypergradient(way, smaller(at, way.share)) - right).norm() / right.norm())
        for name, way in WAYS.items()
    }
    assert off["exact"] < 1e-9
    assert 0 < off["one-sided difference"] < 1e-3  # in float64
    assert all(off[name] > 1e-2 for name in WAYS if name not in ("exact", "one-sided difference"))


@pytest.mark.parametrize("case", ["resnet8x4", "resnet20", "transformer", "lstm", "convnet4"])
def test_a_stage_is_part_of_the_student(case):
    at = task(case, 1)
    names = [name for name, _ in at.student.named_parameters()]
    classifier, both = matching(names, [at.classifier]), matching(names, [at.classifier, at.stage])
    assert classifier == names[-2:] and both[-2:] == classifier
    assert names[len(names) - len(both) :] == both and 2 < len(both) < len(names)


def test_a_smaller_meta_batch_is_a_part_of_the_meta_batch():
    at = task("transformer", 1)
    whole, half = at.meta_batch, smaller(at, 2 / 3, seed=1).meta_batch
    rows = [(whole.inputs == row).all(1).nonzero().item() for row in half.inputs]
    assert len(set(rows)) == 2
    assert torch.equal(half.targets, whole.targets[rows]) and torch.equal(half.teacher, whole.teacher[rows])
    assert len({tuple(smaller(at, 1 / 3, seed).meta_batch.targets.tolist()) for seed in range(20)}) == 3


@pytest.mark.parametrize("name", WAYS)
def test_an_iteration_trains_student_and_weight_model(name):
    at = task("convnet4", 1)
    before = [p.clone() for part in (at.student, at.weighting) for p in part.parameters()]
    ITERATIONS[name](at)()
    after = [p for part in (at.student, at.weighting) for p in part.parameters()]
    assert not any(map(torch.equal, before, after))


def record():
    """Two rounds and two seeds of two ways."""
    rounds = [{"plain": [0.1], "exact": s, "classifier": s / 2} for s in (0.35, 0.37)]
    time = {"kind": "time", "case": "resnet20", "steps": 1, "teacher": False, "rounds": rounds, "failed": {}}
    errors = [
        {
            "kind": "errors", "case": "resnet20", "after": after, "inputs": "random", "methods": ["classifier"],
            "errors": {"classifier": [0.1, 0.1 + after / 100]}, "cosines": {"classifier": [1.0, 0.9]},
        }
        for after in (0, 30)
    ]  # fmt: skip
    accuracies = [
        {"kind": "accuracy", "seed": seed, "epochs": 9, "accuracy": {"exact": 80.0, "classifier": 81.0 - 4 * seed}}
        for seed in (1, 0)
    ]
    settings = {"device": "cpu", "threads": 1, "batch_size": None, "clock": "cpu"}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    return {"command": "python", "environment": about, "settings": settings, "cells": [time, *errors, *accuracies]}


def test_the_tables_follow_the_numbers(tmp_path):
    quick_ways_report.write(record(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| resnet20 | exact | 3.60 (3.50 to 3.70) | 0 (1) | 0 (1) |" in text
    assert "| resnet20 | classifier | 1.80 (1.75 to 1.85) | 0.1 (0.950) | 0.25 (0.950) |" in text
    assert "| classifier | 79.00 ± 2.83 | -1.00 |" in text and "| exact | 80.00 ± 0.00 | 0 |" in text
    assert "1 thread; all times are CPU time" in text and "`blocks.[678].*` in resnet20" in text
    assert (tmp_path / "quick_ways.png").stat().st_size > 10_000


@pytest.mark.slow
def test_one_command_measures_writes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("METAKD_CIFAR10", raising=False)
    command = [sys.executable, "benchmarks/quick_ways.py", *SMOKE, "--epochs", "1", "--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [cell["kind"] for cell in content["cells"]] == ["time", "errors", "errors", "accuracy"]
    timed, start, later, students = content["cells"]
    assert set(timed["rounds"][0]) == {"plain", "exact", "classifier", "one-sided difference"}
    assert start["inputs"] == "random" and start["errors"] != later["errors"]
    assert all(0 < value < 0.5 for value in start["errors"]["one-sided difference"])
    assert set(students["accuracy"]) == {"exact", "classifier", "one-sided difference"}
    content["cells"][3]["accuracy"]["exact"] = 12.5  # it was interrupted here
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900).returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == content["cells"]
    assert "| exact | 12.50 | 0 |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_cpus_clock_is_for_one_thread():
    command = [sys.executable, "-m", "benchmarks.quick_ways", "--clock", "cpu", "--threads", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--clock cpu is for one thread" in done.stderr
