"""The iteration benchmark: all loops train the same student and weight model; the report says what was measured."""

import copy
import doctest
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import iteration, iteration_report
from benchmarks.common import markdown, methods
from benchmarks.common.cases import CASES, Task
from benchmarks.common.loops import METHODS, MODES, PERIOD, WINDOWS, by_peer
from benchmarks.common.measure import ROOT
from metakd import MetaKDError
from metakd._call.replay import WARM_UP
from tests.benchmarks.problems import task
from tests.slow import slow_but

PEERS = ("published way", "by hand", "TorchOpt MetaSGD", "higher")
SMOKE = ["--preset", "smoke", "--threads", "1", "--methods", "accumulate=1", "every=5", "8 terms"]


def differences(a, b):
    """The largest one of each tensor of student and weight model, in one dict."""
    return {
        f"{part}.{name}": float((value - getattr(b, part).state_dict()[name]).abs().max())
        for part in ("student", "weighting")
        for name, value in getattr(a, part).state_dict().items()
    }


def trained(start, loop, calls):
    """A copy of the task after some calls of a loop."""
    known = copy.deepcopy(start)
    call = loop(known)
    for _ in range(calls):
        call()
    return known


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("case", slow_but(["convnet4"], ["convnet4", "resnet20", "transformer", "lstm"]))
def test_all_loops_make_the_same_student_and_weight_model(case, teacher):
    start = task(case, 2, teacher=teacher)
    ours = trained(start, METHODS["accumulate=1"], 3)
    moved = differences(ours, start)
    assert all(any(moved[key] > 1e-4 for key in moved if key.startswith(part)) for part in ("student", "weighting"))
    for name in PEERS:
        assert max(differences(ours, trained(start, METHODS[name], 3)).values()) < 1e-8, name


def by_hand_with_terms(number):
    return lambda start: by_peer(methods.by_hand, start.with_terms(number))


@pytest.mark.parametrize("number", [4, 8])
def test_more_terms_are_more_of_the_same_problem(number):
    start, students = task("convnet4", 2), []
    for loop in (METHODS[f"{number} terms"], by_hand_with_terms(number), METHODS["accumulate=1"]):
        torch.manual_seed(7)  # of the new weight model
        students.append(trained(start, loop, 2))
    ours, by_hand, with_two = students
    assert max(differences(ours, by_hand).values()) < 1e-8
    assert max(differences(ours, with_two).values()) > 1e-3


def by_the_book(start, window):
    """One period written out: gradients by hand, every one or the last one counts; then the student's own step."""
    known = copy.deepcopy(start)
    student, weighting = list(known.student.parameters()), list(known.weighting.parameters())
    optimizer = torch.optim.SGD(student, known.lr, momentum=0.9, weight_decay=5e-4)
    weighting_optimizer = torch.optim.Adam(weighting, lr=1e-3, weight_decay=1e-4)
    gathered = []
    for t, batch in enumerate(known.batches, start=1):
        last = t == len(known.batches)
        if last or window == "accumulate":
            gathered.append(methods.by_hand(known._replace(batches=[batch]))())
        if last:
            for p, *gradients in zip(weighting, *gathered, strict=True):
                p.grad = torch.stack(gradients).mean(0)
            weighting_optimizer.step()
        loss = known.inner(known.student(batch.inputs), batch)
        for p, g in zip(student, torch.autograd.grad(loss, student), strict=True):
            p.grad = g
        optimizer.step()
    return known


@pytest.mark.parametrize("window", ["accumulate", "every"])
def test_a_call_with_a_window_is_one_period(window):
    start = task("convnet4", PERIOD)
    ours = trained(start, METHODS[f"{window}={PERIOD}"], 1)
    assert max(differences(ours, by_the_book(start, window)).values()) < 1e-8


@pytest.mark.parametrize("name", [name for name in METHODS if name not in MODES])
def test_a_call_is_one_iteration_or_as_many_as_there_are_batches(name):
    start = task("convnet4", 3)
    steps = trained(start, METHODS[name], 1).student.get_submodule("1").num_batches_tracked
    assert steps == (3 if name in WINDOWS else 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("name", ["plain", "accumulate=1"])
def test_a_compiled_student_learns_the_same(name):
    start = task("convnet4", 1)
    ours, compiled = (trained(start, METHODS[way], 2) for way in (name, f"{name}, compiled"))
    assert max(differences(ours, compiled).values()) < 1e-8
    assert max(differences(ours, start).values()) > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["plain", "accumulate=1"])
def test_a_replayed_iteration_learns_the_same(name):
    def on_gpu():
        return Task.build(CASES["convnet4"], 1, batch_size=4, device="cuda")

    ours, replayed = on_gpu(), on_gpu()
    known = METHODS[name](ours)
    again = METHODS[f"{name}, CUDA graph"](replayed)  # WARM_UP iterations, and a replay
    for _ in range(2):
        again()
    for _ in range(WARM_UP + 2 + 2):
        known()
    assert max(differences(ours, replayed).values()) < 1e-4


def test_a_cuda_graph_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MetaKDError, match="CUDA graphs need a GPU"):
        METHODS["plain, CUDA graph"](task("convnet4", 1))


def test_the_modes_are_measured_when_asked_for():
    assert MODES.keys() <= METHODS.keys() and not MODES.keys() & set(iteration.ALWAYS)
    assert [*iteration.ALWAYS, *MODES] == iteration.NAMES


def record(seconds, windows):
    """Two rounds: plain iterations of 0.1 s, `accumulate=1` in `seconds`, a period of `accumulate=5` in `windows`."""
    rounds = [{"plain": [0.1] * 3, "accumulate=1": s, "accumulate=5": windows, "8 terms": 0.4} for s in seconds]
    key = {"case": "resnet20", "steps": PERIOD, "teacher": False}
    memory = {"kind": "memory", **key, "method": "higher", "before": 300.0, "peak": 1800.0}
    failed = {"higher": "RuntimeError: no such kernel"}
    settings = {"device": "cpu", "threads": 1, "batch_size": None}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    cells = [{"kind": "time", **key, "rounds": rounds, "errors": {}, "failed": failed}, memory]
    return {"command": "python", "environment": about, "settings": settings, "cells": cells}


def test_verdicts_follow_the_numbers(tmp_path):
    iteration_report.write(record([0.35, 0.37], 1.5), tmp_path)
    good = (tmp_path / "README.md").read_text()
    assert "| resnet20 | accumulate=1 | 3.60 (3.50 to 3.70) |" in good
    assert "| resnet20 | accumulate=5 | 3.00 (3.00 to 3.00) |" in good
    assert "| resnet20 | higher | fails |  | 1,500 |" in good
    assert "- resnet20, higher, time: RuntimeError: no such kernel" in good
    assert "`accumulate=1`, at most 3.6 | met: 3.60 |" in good
    assert "`accumulate=5`, at most 3.2 | met: 3.00 |" in good
    assert "`every=5`, at most 1.45 |  |" in good
    assert "8 terms over 2 terms, at most 1.1 | missed by 1.1 %: 1.11 |" in good
    (tmp_path / "notes.md").write_text("## Notes\n\nWhy.\n")
    iteration_report.write(record([0.396, 0.396], 1.76), tmp_path)
    bad = (tmp_path / "README.md").read_text()
    assert "`accumulate=1`, at most 3.6 | missed by 10.0 %: 3.96 |" in bad
    assert "`accumulate=5`, at most 3.2 | missed by 10.0 %: 3.52 |" in bad
    assert bad.endswith("## Notes\n\nWhy.\n")


def test_examples_of_the_report_hold():
    assert doctest.testmod(markdown) == (0, 5)


@pytest.mark.slow
def test_one_command_measures_writes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "benchmarks/iteration.py", *SMOKE, "--output", str(tmp_path)]

    def run(*more):
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    first = run()
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    found = [(cell["kind"], cell["teacher"], cell.get("method")) for cell in content["cells"]]
    names = ["plain", "accumulate=1", "every=5", "8 terms"]
    assert found == [("time", False, None), ("time", True, None), *(("memory", False, name) for name in names)]
    assert [set(cell["rounds"][0]) for cell in content["cells"][:2]] == [set(names), set(names[:3])]
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    rows = [line.split("|") for line in (tmp_path / "README.md").read_text().splitlines() if "| every=5 |" in line]
    assert all(float(entry.split()[0]) > 0 for entry in rows[0][3:6])

    content["cells"] = [cell for cell in content["cells"] if cell.get("method") != "8 terms"]  # interrupted
    content["cells"][0]["rounds"][0]["every=5"] = 12345.0
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert run().returncode == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["cells"][:-1] == content["cells"]  # kept
    assert again["cells"][-1]["method"] == "8 terms"
