"""The table of unreliable supervision: what is harmed and by how much, the weights, and the report."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"
pytest.importorskip("sklearn")  # of the extra "examples"

from benchmarks.trust import chosen, report, weights
from benchmarks.trust.data import endless, parts_of
from benchmarks.trust.features import features_of
from benchmarks.trust.losses import ByOrigin, Stacked, fit_stacking
from benchmarks.trust.presets import PRESETS
from benchmarks.trust.recipes import Recipe, rows_of
from benchmarks.trust.run import Cell, area, batches, found_by, of_batch, permuted
from benchmarks.trust.settings import KNOWN, SETTINGS, SOURCES, Where
from metakd import Batch, MetaKDError
from metakd.longtail import Images
from metakd.terms import CrossEntropy, GeneralisedCrossEntropy

ROOT = Path(__file__).parents[2]
DIGITS = replace(PRESETS["digits"], steps=3)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return Where(None, tmp_path_factory.mktemp("features"))


def cell_of(setting, where, meta=10, preset=DIGITS, seed=0):
    return Cell(setting, preset, meta, seed, where)


def rows(batch):
    return {tuple(image.tolist()) for image in batch.inputs}


@pytest.mark.parametrize("tail", [None, 20.0])
def test_no_image_is_in_two_parts(where, tail):
    parts = parts_of(DIGITS, 4, 0, *where, tail=tail)
    assert len(set().union(*map(rows, parts))) == sum(len(rows(part)) for part in parts)
    assert torch.bincount(parts.meta.targets).tolist() == [4] * 10
    assert torch.bincount(parts.validation.targets).tolist() == [DIGITS.validation] * 10
    counts = torch.bincount(parts.train.targets)
    assert counts.tolist() == [DIGITS.per_class] * 10 if tail is None else counts[0] >= 15 * counts[-1]


def test_a_larger_meta_set_changes_no_other_part(where):
    small, large = (parts_of(DIGITS, size, 1, *where) for size in (2, 10))
    assert rows(small.meta) < rows(large.meta)
    assert all(torch.equal(getattr(small, p).inputs, getattr(large, p).inputs) for p in ("train", "validation"))
    with pytest.raises(MetaKDError, match="11 images a class is asked for, but 10"):
        parts_of(DIGITS, 11, 0, *where)


def test_labels_are_wrong_as_said(where):
    task = cell_of("sources", where).task
    source = task.train.columns["group"]
    right = [float(task.right[source == s].float().mean()) for s in range(len(SOURCES))]
    assert right[:6] == [1] * 6 and all(0.2 < share < 0.8 for share in right[6:12]) and right[12:] == [0] * 8
    assert torch.equal(task.train.columns["cell"], 10 * source + task.train.targets)
    for setting, share in {"symmetric 20 %": 0.8, "pair 40 %": 0.6, "long tail": 0.6}.items():
        task = cell_of(setting, where).task
        assert abs(float(task.right.float().mean()) - share) < 0.06, setting
    assert torch.allclose(task.log_prior.exp().sum(), torch.tensor(1.0))


def test_what_an_annotator_knows_is_right_and_the_rest_guessed(where):
    parts, task = parts_of(DIGITS, 10, 0, *where), cell_of("annotators", where).task
    true, said = parts.train.targets, task.train.targets
    for annotator, known in enumerate(KNOWN):
        mine = task.train.columns["group"] == annotator
        sure = [c for c in range(10) if bool((said[mine & (true == c)] == c).all())]
        assert len(sure) >= known
        wrong = mine & ~task.right
        involved = {*true[wrong].tolist(), *said[wrong].tolist()}
        assert wrong.any() and len(involved) <= 10 - known


def test_pairs_go_to_one_class_each(where):
    parts, task = parts_of(DIGITS, 10, 0, *where), cell_of("pair 40 %", where).task
    for c in range(10):
        assert set(task.train.targets[parts.train.targets == c].tolist()) == {c, (c + 1) % 10}


def test_every_class_has_a_teacher_that_is_right(where):
    parts, cell = parts_of(DIGITS, 10, 0, *where), cell_of("teachers", where)
    assert len(cell.task.train.teacher) == 3 and not cell.task.train.targets.any()
    assert bool(cell.task.right.any(1).all()) and not bool(cell.task.right.all(1).any())
    answers = torch.stack([z.argmax(1) for z in cell.task.train.teacher], 1)
    right = answers == parts.train.targets[:, None]
    assert float(right[cell.task.right].float().mean()) > 0.9 > 0.1 > float(right[~cell.task.right].float().mean())
    precise = weights.precision(cell.task)
    assert float(precise[cell.task.right].mean()) > float(precise[~cell.task.right].mean()) + 0.5


def test_features_are_fitted_to_training_images_and_know_no_label():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(256, (n, 3, 12, 12), generator=generator, dtype=torch.uint8) for n in (40, 6))
    labels = torch.zeros(40).long(), torch.zeros(6).long()
    images = Images("t", "t", ("a",), train, labels[0], test, labels[1])
    own, other = features_of(images, filters=5, stride=2, components=7)
    assert own.shape == (40, 7) and other.shape == (6, 7) and bool(own.isfinite().all())
    again, changed = features_of(replace(images, test=255 - test, train_targets=labels[0] + 1), filters=5, stride=2,
                                 components=7)  # fmt: skip
    assert torch.equal(own, again) and not torch.allclose(other, changed)


def test_fixed_weights(where):
    cell = cell_of("sources", where)
    train, right = cell.task.train, cell.task.right

    def of(**settings):
        return weights.fixed(Recipe(**settings), cell.task, cell.judge, 0).squeeze(1)

    assert torch.equal(of(weights="oracle", scale=2.0), 2.0 * right)
    drawn = of(weights="random", by="group", draw=1)
    assert len(drawn.unique()) == 20 and not torch.equal(drawn, of(weights="random", by="group", draw=2))
    kept = of(weights="agreement", by="group", keep=0.4)
    of_group = [set(kept[train.columns["group"] == g].tolist()) for g in range(20)]
    assert all(len(values) == 1 for values in of_group) and 0.3 < float(kept.mean()) < 0.5
    alone = of(weights="agreement", keep=0.4)
    assert abs(float(alone.mean()) - 0.4) < 0.01


def test_meta_samples_have_the_weight_of_the_recipe_and_trimming_keeps_the_small_losses():
    batch = Batch(None, index=torch.tensor([1, 0, -1, 2]), columns={"from_meta": torch.tensor([0, 0, 1, 0])})
    given, losses = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [1.0], [0.0], [2.0]])
    assert of_batch(Recipe(meta=0.3), batch, given, losses).squeeze(1).tolist() == pytest.approx([2.0, 1.0, 0.3, 4.0])
    trimmed = of_batch(Recipe("trimmed", meta=0.3, keep=0.6), batch, given, losses)
    assert trimmed.squeeze(1).tolist() == pytest.approx([0.0, 1.0, 0.3, 4.0])


def test_meta_samples_take_cross_entropy_without_the_prior():
    z, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1])
    prior = torch.tensor([0.9, 0.1]).log()
    batch = Batch(None, targets, columns={"from_meta": torch.tensor([0, 1])})
    losses = ByOrigin(GeneralisedCrossEntropy(), prior)(z, batch)
    assert torch.equal(losses[0], GeneralisedCrossEntropy()(z + prior, batch)[0])
    assert torch.equal(losses[1], CrossEntropy()(z, batch)[1])
    assert float(ByOrigin(CrossEntropy(), meta=False)(z, batch)[1]) == 0


def test_stacking_undoes_a_permutation():
    z = 6.0 * torch.eye(3).repeat(20, 1)
    meta = Batch(None, torch.tensor([1, 2, 0]).repeat(20), teacher=[z, torch.zeros_like(z)])
    stacked = Stacked(*fit_stacking(meta, decay=1e-4), learned=True)
    assert len(list(stacked.parameters())) == 2
    right = torch.nn.functional.one_hot(meta.targets, 3).float() * 20
    with torch.no_grad():
        assert float(stacked(right, meta).max()) < 1.0 < float(stacked(z, meta).min())


def test_the_area_under_the_curve_counts_pairs():
    values, right = torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, False, False])
    assert area(values, right) == (1 + 1 + 0.5 + 1) / 4


def test_permuting_moves_whole_groups(where):
    cell = cell_of("sources", where)
    group = cell.task.train.columns["group"]
    generator = torch.Generator().manual_seed(0)
    moved = permuted(group.float().unsqueeze(1), Recipe("table", by="group"), cell.task, generator)
    found = [moved[group == g].unique().tolist() for g in range(20)]
    assert all(len(own) == 1 for own in found) and sorted(own[0] for own in found) == list(range(20))
    assert found != [[float(g)] for g in range(20)]


def test_batches_are_the_same_for_all_recipes(where):
    cell = cell_of("sources", where)
    plain, joined = list(batches(cell, Recipe())), list(batches(cell, Recipe(meta=1.0)))
    assert len(plain) == len(joined) == DIGITS.steps
    for (own, _), (both, _) in zip(plain, joined, strict=True):
        assert torch.equal(own.index, both.index[both.index >= 0])
    whole = Batch(torch.arange(5), torch.arange(5))
    assert len(next(endless(whole, 9, 0)).targets) == 5


@pytest.mark.parametrize(
    ("setting", "recipe"),
    [
        ("sources", Recipe("table", by="group", meta=0.3, controls=True)),
        ("annotators", Recipe("gates", by="group", meta=0.3, start="table")),
        ("long tail", Recipe("classes", term="forward learned", meta=0.3)),
        ("teachers", Recipe("teachers", term="teachers", meta=0.3, folds=2)),
        ("teachers", Recipe(term="stacked learned", meta=0.3)),
    ],
)
def test_learned_weights_are_recorded(where, setting, recipe):
    cell = cell_of(setting, where)
    found = found_by(cell, recipe)
    assert 0 < found["test"] <= 100 and 0 < found["mean weight"] < 2 and json.dumps(found)
    assert ("permuted" in found) == recipe.controls
    if recipe.weights == "table":
        assert len(found["by group"]) == 20 and found["right by group"][:6] == [1.0] * 6


@pytest.mark.parametrize(
    ("setting", "few"), [*((setting, False) for setting in SETTINGS), ("sources", True), ("annotators", True)]
)
def test_no_variant_is_tried_twice_in_a_row(setting, few):
    rows = rows_of(setting, few=few)
    for name, variants in rows.items():
        assert len({str(v) for v in variants}) == len(variants), name
    assert chosen.ORACLE in rows and chosen.RECOMMENDED in rows


def record(validation, test, preset="small"):
    """Cells of two seeds: all variants of the setting, each with these accuracies."""
    about = {"setting": "sources", "meta": 25, "protocol": PRESETS[preset].protocol(), "seconds": 1.0}
    rows = rows_of("sources", few=PRESETS[preset].few)
    tried = [(name, v, seed) for seed in (0, 1) for name, variants in rows.items() for v in variants]
    return [
        {**about, "seed": of[2], "recipe": of[1].settings(), "validation": validation(*of), "test": test(*of)}
        for of in tried
    ]


def content_of(cells):
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    settings = {"device": "cpu", "threads": 1, "batch_size": 128}
    return {"command": "python", "environment": about, "settings": settings, "cells": cells}


def test_validation_chooses_variants_and_the_report_says_so(tmp_path):
    def validation(name, v, seed):
        return 50.0 + (v.keep == 0.5) + (name == "learned table + meta, varied") + (v.draw == 3 + seed)

    def test(name, v, seed):
        return {"agreement + meta": 60.0, chosen.ORACLE: 70.0}.get(name, 40.0) + 25.0 * chosen.is_ours(name) + v.draw

    cells = record(validation, test)
    rows = chosen.rows(cells, "sources", 25)
    assert rows["agreement + meta"].recipe.keep == 0.5
    assert rows["random search + meta"].of("test") == [43.0, 44.0]  # each seed its own
    assert chosen.best(chosen.ours(rows)).name == "learned table + meta, varied"
    content = content_of(cells)
    readme, *_ = report.write(content, tmp_path, PRESETS["small"])
    text = readme.read_text()
    line = (
        "| 60.00 ± 0.00 (agreement + meta) | 65.00 ± 0.00 | 5.00 ± 0.00, 2 of 2 seeds | 65.00 ± 0.00 (learned table + "
    )
    assert f"| sources | 25 {line}meta, varied) |" in text and "| oracle + meta | 2 |" in text
    other = [{**cell, "protocol": {}} for cell in cells]
    assert report.write({**content, "cells": other}, tmp_path, PRESETS["small"]) == []  # stale cells are not reported


def test_the_report_of_few_rows_says_what_the_student_is(tmp_path):
    cells = record(lambda name, v, seed: 50.0, lambda name, v, seed: 40.0 + 9.0 * chosen.is_ours(name), "cnn")
    readme, *_ = report.write(content_of(cells), tmp_path, PRESETS["cnn"])
    text = readme.read_text()
    assert "three 3 x 3 convolutions" in text and "| 9.00 ± 0.00, 2 of 2 seeds |" in text
    assert "| agreement + meta | 4 |" in text and "Meta-Weight-Net" not in text


@pytest.mark.slow
def test_the_command_runs_and_resumes(tmp_path):
    line = [sys.executable, str(ROOT / "benchmarks" / "unreliable.py"), "--preset", "smoke", "--threads", "1"]
    line += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    seconds = []
    for _ in range(2):
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
        assert done.returncode == 0, done.stderr
        cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
        assert not [cell for cell in cells if "failed" in cell]
        seconds.append([cell["seconds"] for cell in cells])
    assert seconds[0] == seconds[1]  # nothing is trained a second time
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Teachers, 5 meta images a class" in text and (tmp_path / "out" / "weights-by-group.png").exists()
