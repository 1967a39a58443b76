"""The long-tailed table: the command, its resumption, and the controls."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import longtail_table
from benchmarks.longtail import best, candidates, figures, methods, parts, ranking, report, snapshots
from benchmarks.longtail.fixed import ClassBalanced, Fixed
from benchmarks.longtail.learned import CONTROLS, MeanOverEpoch, Permuted
from benchmarks.longtail.presets import PRESETS
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.train import Cell, Where, data_of, settings_of, student_of, with_validation_images
from metakd import Batch, MetaKDError
from metakd.terms import CrossEntropy, SoftTarget

ROOT = Path(__file__).parents[2]
SMOKE = replace(PRESETS["smoke"], epochs=2)


def command(folder, *options):
    line = [sys.executable, str(ROOT / "benchmarks" / "longtail_table.py"), "--preset", "smoke", "--threads", "1"]
    line += ["--work", str(folder / "work"), "--output", str(folder / "out"), *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def where(tmp_path):
    return Where(None, False, tmp_path, "cpu")


def setting(counts=(9, 3, 2)):
    student, teacher = nn.Linear(4, len(counts)), nn.Linear(4, len(counts))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return Setting(student, teacher, optimizer, counts, SMOKE)


def batches(count, classes=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(classes, (8,), generator=generator), torch.arange(8))
        for _ in range(count)
    ]


@pytest.mark.slow
def test_the_command_writes_a_table_that_a_second_command_joins(tmp_path):
    command(tmp_path, "--methods", "kd", "bikd", "--seeds", "0", "1")
    first = command(tmp_path, "--methods", "kd+val", "bikd", "best", "--seeds", "0", "1")
    assert "bikd-0" not in first.stderr  # done already
    out = tmp_path / "out"
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("cells/digits-20/kd-*.json"))]
    accuracy = [cell["test"]["overall"] for cell in cells]
    readme = (out / "README.md").read_text()
    assert f"| KD | {statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f} |" in readme
    assert "KD + validation images" in readme and "BiKD, k = 1 | KD |" in readme
    pictures = {path.name for path in out.glob("*.png")}
    assert {"digits-20-class-accuracy.png", "digits-20-bikd-weights-by-loss.png"} <= pictures
    assert all(f"({name})" in readme for name in pictures)
    command(tmp_path, "--methods", "kd", "bikd", "--cost")
    assert "## Cost" in (out / "README.md").read_text()


def test_the_report_of_a_choice_says_so():
    cell = {"settings": {"seed": 10, "dataset": "digits", "imbalance": 20.0, "method": "kd"}, "versions": {}}
    cell |= {"hardware": {"processor": "x", "cores": 2}, "device": "cpu", "threads": 1, "command": "python x.py"}
    assert "8 training images a class that were set aside" in report.head([cell], PRESETS["smoke-choice"])
    assert "set aside" not in report.head([cell], SMOKE)


def test_the_teacher_is_trained_once_for_all_methods(where, monkeypatch):
    cell = Cell("digits", 20.0, "ce", 0)
    one = student_of(cell, SMOKE, where, methods.find("ce"))
    written = next(where.work.glob("*/teacher-*.pt"))
    before = written.stat().st_mtime_ns
    other = student_of(cell._replace(method="kd"), SMOKE, where, methods.find("kd"))
    assert one["teacher"]["test"] == other["teacher"]["test"] and written.stat().st_mtime_ns == before


def test_an_interrupted_run_goes_on_to_the_same_numbers(where, tmp_path):
    class Interrupted(Fixed):
        def __call__(self, setting):
            objective = super().__call__(setting)
            epoch = objective.epoch

            def stopped(number, *rest):
                if number == 1:
                    raise KeyboardInterrupt
                return epoch(number, *rest)

            objective.epoch = stopped
            return objective

    cell, method = Cell("digits", 20.0, "kd", 0), methods.find("kd")
    whole = student_of(cell, SMOKE, where, method)
    elsewhere = where._replace(work=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        student_of(cell, SMOKE, elsewhere, Interrupted(method.title, method.mixture))
    again = student_of(cell, SMOKE, elsewhere, method)
    assert again["test"] == whole["test"] and len(again["history"]) == SMOKE.epochs


@pytest.mark.slow
def test_the_paper_s_cells_train_in_small(tmp_path):
    paper = PRESETS["paper"]
    assert (paper.teacher, paper.student, paper.teacher_epochs, paper.epochs) == ("resnet32x4", "resnet8x4", 240, 120)
    assert (paper.lr, paper.batch_size, paper.teacher_lr, paper.teacher_batch_size) == (0.1, 100, 0.05, 64)
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        for split, images in (("train", 5), ("test", 1)):
            folder = tmp_path / "data" / "cifar10" / split / str(number)
            folder.mkdir(parents=True)
            for image in range(images):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{image}.png")
    short = replace(paper, teacher_epochs=1, epochs=1, batch_size=12, teacher_batch_size=12, validation_per_class=1)
    where = Where(tmp_path / "data", True, tmp_path / "work", "cpu")
    for method in ("bikd", "best"):
        found = student_of(Cell("cifar10", 2.0, method, 0), short, where, methods.find(method))
        assert 20 < sum(found["counts"]) < 40 and math.isfinite(found["test"]["loss"]) and found["learned"]["diagnosis"]


def test_the_validation_images_join_the_training_images(where):
    data = data_of(Cell("digits", 20.0, "ce", 0), SMOKE, where)
    joined = with_validation_images(data)
    assert len(joined.train.targets) == len(data.train.targets) + len(data.validation.targets)
    assert list(joined.counts) == [count + SMOKE.validation_per_class for count in data.counts]
    assert torch.equal(joined.train.images[-len(data.validation.images) :], data.validation.images)


def test_half_of_the_validation_images_join_and_the_others_judge(where):
    data = data_of(Cell("digits", 20.0, "best+half", 0), SMOKE, where)
    joined = with_validation_images(data, half=True)
    half = SMOKE.validation_per_class // 2
    assert list(joined.counts) == [count + half for count in data.counts]
    assert torch.bincount(joined.validation.targets).tolist() == [half] * 10
    added = joined.train.images[len(data.train.images) :]
    both = torch.cat([added, joined.validation.images]).flatten(1)
    assert torch.equal(both.unique(dim=0), data.validation.images.flatten(1).unique(dim=0))


def test_learned_weights_take_the_validation_images_as_training_images_too(where):
    cell = Cell("digits", 20.0, "best+val", 0)
    found, without = (
        student_of(cell._replace(method=name), SMOKE, where, methods.find(name)) for name in ("best+val", "best")
    )
    assert sum(found["counts"]) == sum(without["counts"]) + 10 * SMOKE.validation_per_class
    assert "validation images" in methods.find("best+val").title and methods.find("best+val+frozen").control == "frozen"
    assert found["history"] != without["history"]


def test_a_choice_sees_no_test_image_and_no_image_twice(where):
    preset = PRESETS["smoke-choice"]
    data, plain = (data_of(Cell("digits", 20.0, "kd", 10), of, where) for of in (preset, SMOKE))
    assert torch.bincount(data.test.targets).tolist() == [preset.choice_per_class] * 10
    assert torch.bincount(data.validation.targets).tolist() == [preset.validation_per_class] * 10
    parts = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.validation, data.test)]
    test = {image.numpy().tobytes() for image in plain.test.images}
    assert not any(one & other for i, one in enumerate([*parts, test]) for other in [*parts, test][i + 1 :])
    assert settings_of(Cell("digits", 20.0, "kd", 10), preset, methods.find("kd"))["choice_per_class"] == 8
    assert "choice_per_class" not in settings_of(Cell("digits", 20.0, "kd", 10), SMOKE, methods.find("kd"))


def test_a_cell_that_fails_leaves_the_others_their_turn(tmp_path, monkeypatch):
    def fails(cell, *rest):
        if cell.method == "kd":
            raise MetaKDError("not this one")
        return student_of(cell, *rest)

    monkeypatch.setattr(longtail_table, "student_of", fails)
    options = ["--preset", "smoke", "--seeds", "0", "--methods", "kd", "ce", "--no-report", "--device", "cpu"]
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/longtail_table.py", *options, "--threads", "1", *folders])
    with pytest.raises(MetaKDError, match="each of digits-20/kd-0; all other"):
        longtail_table.main()
    assert [path.stem for path in (tmp_path / "out").rglob("*.json")] == ["ce-0"]


def test_methods_are_ranked_by_what_they_gain_in_the_cells_that_both_have(tmp_path):
    (tmp_path / "cells" / "x").mkdir(parents=True)
    for method, seed, accuracy in (("a", 0, 50), ("a", 1, 60), ("b", 1, 63), ("c", 0, 51), ("c", 1, 61), ("d", 2, 9)):
        about = {"dataset": "x", "imbalance": 5.0, "method": method, "seed": seed}
        cell = {"settings": about, "test": {"overall": accuracy}}
        (tmp_path / "cells" / "x" / f"{method}-{seed}.json").write_text(json.dumps(cell))
    assert ranking.ranked(ranking.read(tmp_path), "a") == [("b", [3]), ("c", [1, 1]), ("a", [0, 0])]


def test_learned_terms_start_as_the_fixed_ones_and_every_part_of_them_moves():
    torch.manual_seed(0)
    made = setting()
    counts, logits = made.counts, torch.randn(5, 3)
    batch = Batch(None, torch.tensor([0, 1, 2, 0, 2]), torch.randn(5, 3))
    fixed = best.terms(counts)
    torch.testing.assert_close(parts.LearnedLabel(counts)(logits, batch), fixed["label"](logits, batch))
    torch.testing.assert_close(parts.LearnedTeacher(counts)(logits, batch), fixed["teacher"](logits, batch))
    balancer = methods.find("best-smooth")(made).balancer
    before = {name: [p.clone() for p in term.parameters()] for name, term in balancer.terms.items() if is_module(term)}
    for _ in range(2):
        balancer(batches(1)[0], batches(2)[1]).backward()
    assert [len(own) for own in before.values()] == [3, 2]
    for name, own in before.items():
        assert not any(torch.equal(old, p) for old, p in zip(own, balancer.terms[name].parameters(), strict=True))
    rates = [group["lr"] for group in balancer.weighting_optimizer.param_groups]
    assert rates == [SMOKE.weighting_lr, 1e-2, 1e-2]


def test_weights_by_the_teacher_tell_right_from_wrong():
    model = parts.ByTeacher((90, 10), terms=2)
    with torch.no_grad():
        model.table.free.copy_(torch.arange(8.0).view(4, 2))
    teacher = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]])  # the last one says 1 without the prior
    found = model(torch.zeros(3, 1), Batch(None, torch.tensor([0, 0, 1]), teacher))
    assert torch.equal(found, model.table.all_weights()[[1, 0, 3]])


def test_what_terms_learned_is_kept(where):
    cell = Cell("digits", 20.0, "best-offsets", 0)
    found = json.loads(json.dumps(student_of(cell, SMOKE, where, methods.find("best-offsets"))))
    history = figures.history_of(found["learned"], 10)
    assert len(history.learned) == 4
    assert history.over_time(history.learned[0]) is not None


def is_module(term):
    return isinstance(term, nn.Module)


@pytest.mark.parametrize("name", dict.fromkeys([*methods.TABLE, *methods.METHODS, *candidates.CHOICE]))
def test_every_method_trains(name):
    made = setting()
    objective = methods.find(name)(made)
    before = [p.clone() for p in made.student.parameters()]
    meta = iter(batches(20))
    seen = 0
    for batch, loss in objective.epoch(0, batches(6), meta):
        assert isinstance(batch, Batch) and loss.isfinite() and loss.ndim == 0
        made.optimizer.zero_grad()
        loss.backward()
        made.optimizer.step()
        seen += 1
    assert seen == 6
    assert not any(torch.equal(old, p) for old, p in zip(before, made.student.parameters(), strict=True))


@pytest.mark.parametrize("control", CONTROLS)
def test_the_controls_of_learned_weights(control):
    made = setting()
    objective = methods.find(f"bikd+{control}")(made)
    start = {name: p.clone() for name, p in objective.balancer.weighting.named_parameters()}
    plain = objective.balancer.weights(*batches(1))
    losses = [loss.detach() for _, loss in objective.epoch(0, batches(3), iter(batches(9)))]
    moved = any(not torch.equal(p, start[name]) for name, p in objective.balancer.weighting.named_parameters())
    assert moved == (control != "frozen") and len(losses) == 3
    assert plain.std(0).min() > 0  # else the controls would change nothing


def test_permuted_weights_are_those_of_another_sample():
    model = nn.Linear(2, 1)
    permuted = Permuted(lambda features, batch: model(features))
    features = torch.randn(5, 2)
    found = permuted(features, Batch(None))
    torch.testing.assert_close(found, model(features)[[4, 0, 1, 2, 3]])


def test_the_mean_is_that_of_the_last_epoch():
    mean = MeanOverEpoch(lambda features, batch: features, terms=2)
    first, second = torch.rand(4, 2), torch.rand(6, 2)
    mean(first, Batch(None))
    torch.testing.assert_close(mean(second, Batch(None))[0], torch.cat([first, second]).mean(0))
    mean.end_epoch()
    found = mean(torch.rand(3, 2), Batch(None))
    torch.testing.assert_close(found, torch.cat([first, second]).mean(0).expand(3, 2))


def test_the_teacher_s_terms_warm_up():
    made = setting()._replace(preset=replace(SMOKE, epochs=10))
    one = {"hard": (1.0, lambda z, batch: torch.ones(len(z))), "soft": (8.0, lambda z, batch: torch.ones(len(z)))}
    one["hard"][1].uses_teacher = False
    objective = Fixed("x", lambda counts: one, warmup=0.4)(made)
    found = [float(next(iter(objective.epoch(epoch, batches(1), iter([]))))[1]) for epoch in range(5)]
    assert found == pytest.approx([3.0, 5.0, 7.0, 9.0, 9.0])


def test_late_weights_come_with_the_first_decay():
    made = setting()._replace(preset=replace(SMOKE, epochs=20))
    early, late = ({"hard": (weight, lambda z, batch: torch.ones(len(z)))} for weight in (1.0, 5.0))
    objective = Fixed("x", lambda counts: early, late=lambda counts: late)(made)
    found = [float(next(iter(objective.epoch(epoch, batches(1), iter([]))))[1]) for epoch in range(20)]
    assert found == [1.0] * 13 + [5.0] * 7


@pytest.mark.parametrize(
    "name", ["none", "kd+frozen", "kd+half", "bikd+other", "bikd+val+val", "bikd+frozen+val", "kd+"]
)
def test_names_that_are_not_there(name):
    with pytest.raises(MetaKDError, match="there is no method"):
        methods.find(name)


def test_a_learned_method_s_settings_do_not_decide_a_fixed_one_s_numbers():
    cell = Cell("digits", 20.0, "kd", 0)
    assert "weighting_lr" not in settings_of(cell, SMOKE, methods.find("kd"))
    assert "weighting_lr" in settings_of(cell, SMOKE, methods.find("bikd"))


def test_questions_are_about_methods_that_are_there():
    for name, rivals in methods.QUESTIONS.items():
        assert {type(methods.find(each)).__name__ for each in (name, *rivals)} <= {"Fixed", "Learned"}


def test_class_balanced_weights_are_inverse_effective_numbers():
    term = ClassBalanced((100, 1), CrossEntropy(), beta=0.9)
    batch, logits = Batch(None, torch.tensor([0, 1, 1])), torch.zeros(3, 2)
    effective = [sum(0.9**i for i in range(count)) for count in (100, 1)]  # 1 + beta + beta^2 + ...
    mean = statistics.mean(1 / number for number in effective)
    expected = [math.log(2) / effective[label] / mean for label in (0, 1, 1)]
    assert term(logits, batch).tolist() == pytest.approx(expected, rel=1e-6)
    assert not term.uses_teacher and ClassBalanced((1, 1), SoftTarget()).uses_teacher


def test_methods_with_the_same_seeds_share_a_command():
    def cell(method, seed, imbalance=50.0, output=""):
        about = {"dataset": "digits", "imbalance": imbalance, "method": method, "seed": seed}
        call = f"python x.py --preset a{output} --seeds {seed} 9 --methods {method} more --threads 1"
        return {"settings": about, "command": call}

    cells = [cell("kd", 0), cell("kd", 1), cell("bikd", 0), cell("ce", 0), cell("ce", 1), cell("kd", 0, 100.0)]
    assert report.commands([*cells, cell("kd", 10, output=" --output b")]) == [
        "python x.py --preset a --threads 1 --datasets digits --imbalances 50 --seeds 0 1 --methods kd ce",
        "python x.py --preset a --threads 1 --datasets digits --imbalances 50 --seeds 0 --methods bikd",
        "python x.py --preset a --threads 1 --datasets digits --imbalances 100 --seeds 0 --methods kd",
        "python x.py --preset a --output b --threads 1 --datasets digits --imbalances 50 --seeds 10 --methods kd",
    ]


def test_snapshots_hold_the_weight_model(tmp_path):
    made = setting()
    balancer = methods.find("bikd")(made).balancer
    balancer(batches(1)[0], batches(1)[0]).backward()
    snapshot = json.loads(json.dumps(snapshots.taken(balancer, batches(9))))
    assert torch.tensor(snapshot["losses"]).shape == (24, 2)  # three batches of eight
    seen = torch.rand(5, 2)
    expected = balancer.weighting(seen, Batch(None))
    torch.testing.assert_close(snapshots.model_of(snapshot)(seen, Batch(None)), expected, rtol=1e-3, atol=1e-3)
    assert snapshots.weighs_by_loss(balancer)
    assert not any(snapshots.weighs_by_loss(methods.find(name)(made).balancer) for name in ("best", "bikd-inputs"))
    path = tmp_path / "maps.png"
    snapshots.draw({5: snapshot, 10: snapshot}, list(balancer.terms), path, title="t")
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 100


def test_a_folder_without_cells_has_no_table(tmp_path):
    assert report.write(tmp_path, SMOKE) == []
