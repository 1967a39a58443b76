"""The cost benchmark: all methods solve the same problem; record, report and verdicts say what was measured."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import hypergradient_report
from benchmarks.common.measure import ROOT, time_cell
from benchmarks.common.methods import METHODS, ONE_STEP
from tests.benchmarks.problems import task
from tests.slow import slow_but

CASES = ("convnet4", "resnet20", "transformer", "lstm")
EXACT = ("Unroll", "Adjoint", "TorchOpt MetaSGD", "higher")
TIMED = ["--preset", "smoke", "--steps", "2", "--methods", "Adjoint", "by hand", "--threads", "1"]


def hypergradient(name, case, steps=2):
    return torch.cat([g.flatten() for g in METHODS[name](task(case, steps))()])


def off(name, case, steps=2):
    right = hypergradient("by hand", case, steps)
    return float((hypergradient(name, case, steps) - right).norm() / right.norm())


@pytest.mark.parametrize("case", slow_but(["convnet4"], CASES))
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_agree_with_the_double_backward_by_hand(name, case):
    assert off(name, case) < 1e-9


@pytest.mark.parametrize("case", slow_but(["convnet4"], ["convnet4", "transformer", "lstm"]))
def test_approximations_are_near_and_those_of_one_step_exact(case):
    assert 0 < off("FiniteDifference", case) < 0.05
    assert off("IdentityJacobian", case) > 1e-5  # by hand does feel the inner Hessian
    assert off("IdentityJacobian", case, steps=1) < 1e-9
    assert off("OneStep", case, steps=1) < 1e-9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", slow_but(["convnet4"], ["convnet4", "lstm"]))
def test_every_call_solves_the_same_problem(name, case):
    start = task(case, 1 if name in ONE_STEP else 2)
    before = {key: value.clone() for key, value in start.student.state_dict().items()}
    call = METHODS[name](start)
    first = [g.clone() for g in call()]
    assert all(map(torch.equal, first, call()))
    after = start.student.state_dict()
    if not name.startswith("plain"):  # a real step moves the running statistics
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.is_leaf for p in start.student.parameters())


@pytest.mark.slow
def test_a_method_that_fails_is_named_and_the_others_go_on():
    def broken(problem):
        def call():
            raise RuntimeError("no such kernel")

        return call

    def breaks_later(problem):
        calls = iter([[torch.ones(1)]]) if len(problem.batches) == 1 else iter([])
        return lambda: next(calls)

    chosen = {name: METHODS[name] for name in ("plain", "Adjoint", "by hand")}
    cell = time_cell(task("convnet4", 2), {**chosen, "a": broken, "b": breaks_later}, repeats=2, seconds=60)
    assert cell["failed"] == {"a": "RuntimeError: no such kernel", "b": "StopIteration:"}
    assert [set(one) for one in cell["rounds"]] == [{"plain", "Adjoint", "by hand"}] * 2
    assert cell["errors"]["Adjoint"] < 1e-9


@pytest.mark.slow
def test_the_memory_of_a_call_is_what_it_took():
    code = (
        "import torch; from benchmarks.common.measure import peak_memory as p; print(p(lambda: torch.ones(25_000_000)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.replace("'", '"'))
    assert 95 < found["peak"] - found["before"] < 120


def record(adjoint, megabytes):
    """Ten plain steps of 0.1 s, `Adjoint` in so many seconds at K = 2, MetaSGD in 0.8; MB of `Adjoint` at K = 2, 20."""
    rounds = [{"plain": [0.1] * 10, "Adjoint": adjoint, "TorchOpt MetaSGD": 0.8}]
    time = {"kind": "time", "case": "lstm", "steps": 2, "rounds": rounds, "errors": {"Adjoint": 2e-7}, "failed": {}}
    memory = [
        {"kind": "memory", "case": "lstm", "steps": k, "method": name, "before": 300.0, "peak": 300.0 + mb}
        for k, name, mb in ((2, "Adjoint", megabytes[0]), (20, "Adjoint", megabytes[1]), (20, "Unroll", 800.0))
    ]
    settings = {"device": "cpu", "threads": 1, "batch_size": None}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    return {"command": "python", "environment": about, "settings": settings, "cells": [time, *memory]}


def test_verdicts_follow_the_numbers(tmp_path):
    hypergradient_report.write(record(0.72, (100.0, 140.0)), tmp_path)
    good = (tmp_path / "README.md").read_text()
    assert "at most 4.3 | met: 3.60 at K = 2 |" in good
    assert "over TorchOpt MetaSGD, at most 1 | met: 0.90 at K = 2 |" in good
    assert "over that at K = 2, at most 1.5 | met: 1.40 at K = 20 |" in good
    assert "over `Unroll`, at most 0.25 | met: 0.17 at K = 20 |" in good
    (tmp_path / "notes.md").write_text("## Notes\n\nWhy.\n")
    hypergradient_report.write(record(0.946, (100.0, 220.0)), tmp_path)
    bad = (tmp_path / "README.md").read_text()
    assert "at most 4.3 | missed by 10.0 %: 4.73 at K = 2 |" in bad
    assert "over TorchOpt MetaSGD, at most 1 | missed by 18.2 %: 1.18 at K = 2 |" in bad
    assert "over that at K = 2, at most 1.5 | missed by 46.7 %: 2.20 at K = 20 |" in bad
    assert "over `Unroll`, at most 0.25 | missed by 10.0 %: 0.28 at K = 20 |" in bad
    assert bad.endswith("## Notes\n\nWhy.\n")


def run(output, *arguments):
    command = [sys.executable, "benchmarks/hypergradient.py", *TIMED, "--output", str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_command_measures_writes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    kinds = {(cell["kind"], cell.get("method")) for cell in content["cells"]}
    assert kinds == {("time", None), ("memory", "plain"), ("memory", "Adjoint"), ("memory", "by hand")}
    (timed,) = (cell for cell in content["cells"] if cell["kind"] == "time")
    assert timed["errors"]["Adjoint"] < 1e-4
    assert all(0 < cell["before"] <= cell["peak"] for cell in content["cells"] if cell["kind"] == "memory")
    assert str(ROOT) not in json.dumps(content["environment"])
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    row = next(line for line in (tmp_path / "README.md").read_text().splitlines() if "| Adjoint |" in line)
    assert all(float(entry.replace(",", "")) > 0 for entry in row.split("|")[3:5])

    content["cells"] = [cell for cell in content["cells"] if cell.get("method") != "Adjoint"]  # interrupted
    content["cells"][0]["rounds"][0]["Adjoint"] = 12345.0
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert run(tmp_path).returncode == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["cells"][: len(content["cells"])] == content["cells"]  # kept
    assert [cell["method"] for cell in again["cells"][len(content["cells"]) :]] == ["Adjoint"]

    other = run(tmp_path, "--batch-size", "5")
    assert other.returncode == 1
    assert "batch_size None, now 5" in other.stderr
