"""The benchmark of the meta set's size: who gets which images, what is compared, and what the report says."""

import json
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

pytest.importorskip("higher")  # of the extra "benchmarks"
pytest.importorskip("sklearn")  # of the extra "examples"

from benchmarks import meta_set_report
from benchmarks.common import meta_sets
from benchmarks.common.measure import ROOT
from benchmarks.longtail import methods
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.train import Cell, Where, data_of, network, optimizer_of
from metakd import Batch
from metakd.weighting.features import student_and_teacher

CELL = {"seed": 0, "epochs": 1, "sizes": [1, 3], "methods": ["kd", "bikd"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    where = Where(None, False, tmp_path_factory.mktemp("digits"), "cpu")
    return data_of(Cell("digits", 20.0, "bikd", 0), meta_sets.preset_of(CELL), where)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_a_larger_meta_set_holds_the_smaller_ones_and_no_training_image(data):
    one, three = (meta_sets.with_meta_set(data, size) for size in (1, 3))
    for size, given in ((1, one), (3, three)):
        assert torch.bincount(given.validation.targets).tolist() == [size] * 10
        assert given.train is data.train and given.test is data.test
        assert not rows(given.validation.images) & rows(data.train.images)
    assert rows(one.validation.images) < rows(three.validation.images)


def test_the_rival_trains_on_the_meta_images_and_learned_weights_do_not(data, monkeypatch):
    seen = []

    def trained(cell, preset, where, teacher, given, method, milestones):
        sizes = len(given.train.targets), sum(given.counts), len(given.validation.targets)
        seen.append((cell.method, *sizes, getattr(method, "control", None)))
        return {"test": {"overall": float(len(seen))}}

    monkeypatch.setattr(meta_sets, "trained", trained)
    monkeypatch.setattr(meta_sets, "teacher_of", lambda *args: (torch.nn.Identity(), {}))
    found = meta_sets.accuracy_cell(CELL)
    n = len(data.train.targets)
    assert seen == [
        ("kd-0", n, n, 30, None),
        ("kd-1", n + 10, n + 10, 10, None),
        ("kd-3", n + 30, n + 30, 30, None),
        ("bikd-0", n, n, 30, "frozen"),
        ("bikd-1", n, n, 10, None),
        ("bikd-3", n, n, 30, None),
    ]
    assert found == {"accuracy": {"kd": [1.0, 2.0, 3.0], "bikd": [4.0, 5.0, 6.0]}}


def test_disjoint_meta_sets_are_balanced_and_share_no_image(data):
    (x, y), (other_x, other_y) = meta_sets.disjoint(data, 5, torch.Generator().manual_seed(0))
    assert torch.bincount(y).tolist() == torch.bincount(other_y).tolist() == [5] * 10
    assert len(rows(x) | rows(other_x)) == 100


def test_hypergradients_are_those_of_the_step_ahead_and_move_nothing(data):
    preset, at = meta_sets.preset_of(CELL), Cell("digits", 20.0, "bikd", 0)
    student, teacher = (network(at._replace(seed=seed), preset, WHERE) for seed in (0, 1))
    setting = Setting(student, teacher.eval(), optimizer_of(student, preset), data.counts, preset)
    balancer = methods.LEARNED["bikd"](setting).balancer
    batches = [next(data.train.endless(epoch)) for epoch in range(2)]
    meta = meta_sets.disjoint(data, 2, torch.Generator().manual_seed(0))[0]
    parts = [*student.parameters(), *balancer.weighting.parameters()]
    before = [p.detach().clone() for p in parts]
    found = meta_sets.hypergradients(balancer, batches, meta)
    assert all(map(torch.equal, before, parts))
    for batch, row in zip(batches, found, strict=True):
        right = torch.cat([g.flatten() for g in by_hand(balancer, batch, meta, preset.lr)]).double()
        assert (row - right).norm() < 1e-4 * right.norm()


def by_hand(balancer, batch, meta, lr):
    student, known = balancer.student, Batch(batch[0], batch[1], balancer.teacher(batch[0]).detach())
    params = dict(student.named_parameters())
    outputs = functional_call(student, params, known.inputs)
    losses = torch.stack([term(outputs, known) for term in balancer.terms.values()], dim=1)
    weights = balancer.weighting(student_and_teacher(losses, outputs, known).detach(), known)
    gradients = torch.autograd.grad((weights * losses).sum() / len(losses), list(params.values()), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(params.items(), gradients, strict=True)}
    meta_loss = F.cross_entropy(functional_call(student, ahead, meta[0]), meta[1])
    return torch.autograd.grad(meta_loss, list(balancer.weighting.parameters()))


WHERE = Where(None, False, ROOT, "cpu")  # nothing is written


@pytest.mark.parametrize(
    ("turns_with", "expected"),
    [("nothing", [1.0, 1.0, 1.0]), ("the batch", [1.0, 0.0, 1.0]), ("the set", [0.0, 1.0, 0.0])],
)
def test_the_cosines_tell_the_noise_of_sets_from_that_of_batches(data, monkeypatch, turns_with, expected):
    calls = []

    def hypergradients(balancer, batches, meta):
        calls.append(meta)
        directions = torch.eye(2 + len(batches), dtype=torch.float64)
        if turns_with == "the batch":
            return directions[2:]
        return directions[len(calls) % 2 if turns_with == "the set" else 0].expand(len(batches), -1)

    monkeypatch.setattr(meta_sets, "hypergradients", hypergradients)
    found = meta_sets.cosines(None, data, [1, 3], 0)
    assert [len(meta[1]) for meta in calls] == [10] * 12 + [30] * 12
    assert [found[name] for name in ("other set", "other batch", "other set, mean")] == [
        pytest.approx([value] * 2) for value in expected
    ]


def record():
    """Two seeds of two methods, two sizes."""
    key = {"epochs": 9, "sizes": [1, 20]}
    accuracies = [
        {"kind": "accuracy", "seed": seed, **key, "methods": ["kd", "bikd"],
         "accuracy": {"kd": [80.0, 81.0, 90.0 + seed], "bikd": [80.0, 82.0, 84.0 - seed]}}
        for seed in (1, 0)
    ]  # fmt: skip
    kinds = ("other set", "other batch", "other set, mean")
    noise = [
        {"kind": "noise", "seed": seed, **key, "methods": ["bikd"],
         "noise": {point: {kind: [0.5 + seed / 5, 0.9] for kind in kinds} for point in ("0", "9")}}
        for seed in (0, 1)
    ]  # fmt: skip
    settings = {"device": "cpu", "threads": 1, "batch_size": None}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    return {"command": "python", "environment": about, "settings": settings, "cells": [*accuracies, *noise]}


def test_the_tables_follow_the_numbers(tmp_path):
    meta_set_report.write(record(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| KD + the images | 80.00 ± 0.00 | 81.00 ± 0.00 | 90.50 ± 0.71 |" in text
    assert "| BiKD, k = 1, over KD + the images | +1.00 ± 0.00 | -7.00 ± 1.41 |" in text
    assert "| 9 | other batch | 0.60 ± 0.14 | 0.90 ± 0.00 |" in text
    assert "over the seeds 0, 1." in text and "20 images a class are held back" in text
    assert (tmp_path / "meta_set.png").stat().st_size > 10_000


@pytest.mark.slow
def test_one_command_measures_writes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "benchmarks/meta_set.py", "--preset", "smoke", "--threads", "1"]
    command += ["--methods", "kd", "bikd", "--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    students, noise = content["cells"]
    assert {name: len(found) for name, found in students["accuracy"].items()} == {"kd": 3, "bikd": 3}
    assert list(noise["noise"]) == ["0", "1", "2"]
    assert all(-1 <= c <= 1 for point in noise["noise"].values() for kind in point.values() for c in kind)
    students["accuracy"]["kd"][0] = 12.5  # it was interrupted here
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900).returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == content["cells"]
    assert "| KD + the images | 12.50 |" in (tmp_path / "README.md").read_text()
