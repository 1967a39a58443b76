"""The long-tailed table in a hurry: replayed iterations, small teachers, time limits, images as mosaics."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import nn

from benchmarks.common.measure import ROOT
from benchmarks.longtail import methods, mosaics, teachers, train
from benchmarks.longtail.fit import Unfinished, Where, fit
from benchmarks.longtail.presets import PRESETS
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.steps import InHalf, Replayed, as_written
from benchmarks.longtail.train import Cell, data_of, images_of, network, settings_of, student_of
from metakd import MetaKDError
from metakd._call.replay import Replay
from metakd.longtail import Images, build_model

SMOKE = PRESETS["smoke"]
CELL = Cell("digits", 20.0, "kd", 0)


@pytest.fixture
def where(tmp_path):
    return Where(None, False, tmp_path / "work", "cpu")


def items(count, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator), torch.arange(size))
        for _ in range(count)
    ]


def objective_of(name, preset=SMOKE, device="cpu"):
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(device) for _ in range(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    return methods.find(name)(Setting(student, teacher.eval(), optimizer, (9, 3, 2), preset)), optimizer


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize(
    "name",
    [
        "kd", "mixture", "dkd", "kd-late", "kd-classes", "best", "bikd-mix", "mwn-rarity",
        "best-all", "best-smooth", "best-k5", "best-mirror", "network",
    ],
)  # fmt: skip
def test_replayed_iterations_are_those_as_written(name, device):
    preset = replace(SMOKE, epochs=30)  # dkd's weights rise over the first epochs
    losses, students = [], []
    for way in ("written", "replayed"):
        objective, optimizer = objective_of(name, preset, device)
        replayed = Replayed(objective, optimizer)
        found = []
        meta = cycle([[tensor.to(device) for tensor in item] for item in items(15)[12:]])
        for epoch, batches in enumerate((items(6), items(9)[3:], items(12)[6:])):
            on_device = [[tensor.to(device) for tensor in item] for item in batches]
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)
            if way == "replayed":
                steps = replayed.epoch(10 * epoch, on_device, meta)
            else:
                steps = as_written(objective, optimizer, 10 * epoch, on_device, meta)
            found += [float(loss.detach()) for _, loss in steps]
        losses.append(found)
        students.append(torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]]))
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(*students, **exact)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len({*losses[0]}) == 18


def test_a_graph_is_captured_anew_when_a_number_in_it_changes(monkeypatch):
    ran, captured = [], []

    def capture(self, shape):  # as torch's: runs nothing
        captured.append(len(ran))
        return lambda: self.iteration(*shape.items)

    objective, optimizer = objective_of("kd", replace(SMOKE, epochs=30))
    replayed = Replayed(objective, optimizer)
    iteration = replayed.step.iteration
    replayed.step.iteration = lambda *items: (ran.append(1), iteration(*items))[1]
    replayed.step.captures = True
    monkeypatch.setattr(Replay, "_capture", capture)
    monkeypatch.setattr(Replay, "_aside", lambda self, shape: self.iteration(*shape.items))
    for epoch, lr in enumerate((0.1, 0.1, 0.01)):
        optimizer.param_groups[0]["lr"] = lr
        assert len(list(replayed.epoch(epoch, items(5), iter([])))) == 5
    assert captured == [3, 13] and len(ran) == 15


def test_half_is_near_and_returns_float32():
    network = nn.Linear(64, 8)
    inputs = torch.randn(5, 64)
    found, exact = InHalf(network)(inputs), network(inputs)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)


def test_a_packed_teacher_is_a_quarter_and_gives_nearly_the_same():
    torch.manual_seed(0)
    model = build_model("resnet8", classes=10).eval()
    state = teachers.packed(model.state_dict())
    kept, whole = (sum(v.numel() * v.element_size() for v in s.values()) for s in (state, model.state_dict()))
    assert kept < 0.3 * whole
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(teachers.unpacked(state))
    inputs = torch.randn(16, 3, 32, 32)
    expected, found = model(inputs), rounded(inputs)
    assert 0 < float(((found - expected).norm() / expected.norm()).detach()) < 0.03
    for name, value in rounded.state_dict().items():
        step = model.state_dict()[name].abs().max() / 127
        assert (value - model.state_dict()[name]).abs().max() <= 0.51 * step
    again = teachers.unpacked(teachers.packed(rounded.state_dict()))  # rounding once is enough
    assert all(torch.allclose(again[name], value, rtol=1e-6) for name, value in rounded.state_dict().items())


def test_all_students_have_the_rounded_teacher(where, tmp_path, monkeypatch):
    where = where._replace(teachers=tmp_path / "teachers")
    seen = []

    def remember(cell, *rest):
        model, result = train_teacher(cell, *rest)
        seen.append((model.state_dict(), result))
        return model, result

    train_teacher = train.teacher_of
    monkeypatch.setattr(train, "teacher_of", remember)
    student_of(CELL, SMOKE, where, methods.find("kd"))
    assert not list(where.work.rglob("teacher*"))
    student_of(CELL._replace(method="ce"), SMOKE, where, methods.find("ce"))
    (first, one), (second, other) = seen
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one["test"]["overall"] == other["test"]["overall"] and "before_rounding" in other
    weights = first["0.weight"].flatten(1)
    assert all(len(row.unique()) <= 255 for row in weights)
    assert not {p.suffix for p in where.teachers.iterdir()} - {".json", ".safetensors"}


def test_a_run_out_of_time_goes_on_to_the_same_numbers(where, tmp_path):
    preset, method = replace(SMOKE, epochs=4, evaluate_every=1), methods.find("bikd")
    cell = CELL._replace(method="bikd")

    def train_until(folder, until):
        here = where._replace(work=folder, fast=True, until=until)
        settings = settings_of(cell, preset, method)
        teacher = network(cell, preset.of_teacher(), here).eval()
        student = network(cell, preset, here)
        return fit("x", settings, preset, here, student, teacher, data_of(cell, preset, here), method, (0.5,))

    whole = train_until(tmp_path / "whole", None)
    with pytest.raises(Unfinished, match="x: 0 of 4 epochs"):
        train_until(tmp_path / "parts", time.monotonic() - 1)
    done = 0
    while done < 4:
        clock = iter([-1.0, -1.0, *[1e9] * 9])  # one epoch, then none
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("benchmarks.longtail.fit.time.monotonic", lambda clock=clock: next(clock))
            try:
                parts = train_until(tmp_path / "parts", 1e6)
                done = 4
            except Unfinished as stopped:
                assert f"x: {done + 1} of 4 epochs" in str(stopped)
                done += 1
    for found in (whole, parts):
        for entry in found["history"]:
            entry.pop("seconds")
    assert whole["history"] == parts["history"] and whole["test"] == parts["test"]


def test_a_checkpoint_of_other_rounding_is_refused(where):
    student_of(CELL, SMOKE, where, methods.find("kd"))
    with pytest.raises(MetaKDError, match="fast: 'absent' there, True here"):
        student_of(CELL, SMOKE, where._replace(fast=True), methods.find("kd"))


def test_the_teacher_s_passes_are_in_half_where_it_is_in_a_hurry(where, monkeypatch):
    kinds = []
    known = train.fit

    def watched(name, settings, preset, where, model, teacher, *rest):
        kinds.append(type(teacher))
        return known(name, settings, preset, where, model, teacher, *rest)

    monkeypatch.setattr(train, "fit", watched)
    student_of(CELL, SMOKE, where._replace(fast=True), methods.find("kd"))
    assert kinds == [type(None), InHalf]


def pictures(sizes=(120, 110, 105), test=7):
    targets = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    torch.manual_seed(1)
    train_images = torch.randint(0, 256, (len(targets), 3, 8, 8), dtype=torch.uint8)
    order = torch.randperm(len(targets))
    return Images("toy", "toy", tuple("abc"), train_images[order], targets[order], train_images[:test],
                  torch.arange(3).repeat_interleave(torch.tensor([3, 2, 2])))  # fmt: skip


def test_mosaics_are_lossless(tmp_path):
    images = pictures()
    mosaics.write(images, tmp_path / "toy")
    found = mosaics.read(tmp_path / "toy")
    for c in range(3):
        assert torch.equal(found.train[found.train_targets == c], images.train[images.train_targets == c])
    assert torch.equal(found.test, images.test) and torch.equal(found.test_targets, images.test_targets)
    assert (found.classes, found.title) == (images.classes, "toy")
    assert torch.equal(images_of("toy", Where(tmp_path, False, tmp_path, "cpu")).test, images.test)


def test_mosaics_of_a_long_tail_hold_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaics, "VALIDATION", 30)  # 10 a class
    mosaics.write(pictures(), tmp_path / "toy", imbalance=5.0)
    found = mosaics.read(tmp_path / "toy")
    assert torch.bincount(found.train_targets).tolist() == [110 + 10, 49 + 10, 22 + 10]


def test_mosaics_for_a_choice_hold_both_long_tails(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaics, "VALIDATION", 30)
    mosaics.write(pictures(), tmp_path / "toy", imbalance=5.0, validation=90)
    found = mosaics.read(tmp_path / "toy")
    # 110 + 10 and 90 + 30 of the first class, 40 + 30 and 18 + 30 of the others where 30 are set aside
    assert torch.bincount(found.train_targets).tolist() == [120, 40 + 30, 18 + 30]


def test_a_mosaic_that_lacks_images_is_refused(tmp_path):
    mosaics.write(pictures(), tmp_path / "toy")
    index = json.loads((tmp_path / "toy" / "index.json").read_text())
    index["counts"]["train/b"] = 129
    (tmp_path / "toy" / "index.json").write_text(json.dumps(index))
    with pytest.raises(MetaKDError, match=r"b\.webp has 128 images, 129 expected"):
        mosaics.read(tmp_path / "toy")
    (tmp_path / "toy" / "test" / "c.webp").unlink()
    with pytest.raises(MetaKDError, match="cannot be read"):
        mosaics._tiles(tmp_path / "toy" / "test" / "c.webp", index, "test/c")


@pytest.mark.slow
def test_the_command_stops_in_time_and_goes_on(tmp_path):
    def command(*options):
        line = [sys.executable, "benchmarks/longtail_table.py", "--preset", "smoke", "--seeds", "0", "--fast"]
        line += ["--methods", "kd", "--threads", "1", "--no-report", *options]
        line += [f"--{name}={tmp_path / name}" for name in ("work", "output", "teachers")]
        return subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False
        )

    stopped = command("--until", "0")
    assert stopped.returncode == 75 and "0 of 1 epochs are done" in stopped.stderr, stopped.stderr
    assert command("--until", "600").returncode == 0
    (cell,) = (json.loads(path.read_text()) for path in tmp_path.glob("output/cells/*/*.json"))
    assert cell["fast"] and cell["test"]["overall"] > 10
    assert not list(tmp_path.glob("work/*/*.pt"))
