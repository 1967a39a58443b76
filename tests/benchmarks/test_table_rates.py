"""The benchmark of the tables' learning rate: what its tasks are, and what the report says."""

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"
pytest.importorskip("sklearn")  # of the extra "examples"

from benchmarks import table_rates
from benchmarks.common import rates, with_meta
from benchmarks.common.small_tasks import HELD, TASKS, rows_of, student
from metakd import BilevelLossBalancer


def rows(batch):
    return {tuple(image.tolist()) for image in batch.inputs}


@pytest.mark.parametrize("name", TASKS)
def test_no_image_is_in_two_parts_and_the_table_fits(name):
    task = TASKS[name](0)
    parts = [task.train, task.meta, task.validation, task.test]
    assert len(set().union(*map(rows, parts))) == sum(len(rows(part)) for part in parts)
    for part in (task.meta, task.validation):
        assert torch.bincount(part.targets).tolist() == [HELD] * 10
    weights = task.table()(torch.zeros(40, 1), rows_of(task.train, torch.arange(40)))
    assert weights.shape == (40, len(task.terms)) and bool((weights == 1).all())


def test_labels_are_wrong_as_said():
    sources, noise = TASKS["sources"](0), TASKS["noise"](0)
    source = sources.train.columns["source"]
    right = [float(sources.trusted[source == s].float().mean()) for s in range(12)]
    assert right[:3] == [1, 1, 1] and all(0.3 < r < 0.7 for r in right[3:7]) and right[7:] == [0] * 5
    assert 0.55 < float(noise.trusted.float().mean()) < 0.65
    quality = (TASKS["annotators"](0).train.targets == TASKS["noise"](0).train.targets[:, None]).float().mean(0)
    assert quality[0] > quality[1] > quality[2] > quality[3]
    counts = torch.bincount(TASKS["long tail"](0).train.targets)
    assert counts[0] / counts[-1] >= 40


def test_a_cell_trains_every_method_from_one_start():
    found = rates.rates_cell(
        {"task": "sources", "seed": 0, "epochs": 1, "methods": ["equal weights", "bounded, 0.001"]}
    )
    assert not found["failed"] and set(found["found"]["bounded, 0.001"]) == {"validation", "test", "low", "high"}
    assert abs(found["found"]["bounded, 0.001"]["test"] - found["found"]["equal weights"]["test"]) < 5
    before = torch.get_rng_state()
    same = [student(3)[0](torch.ones(1, 64)) for _ in range(2)]
    assert torch.equal(*same) and torch.equal(torch.get_rng_state(), before)


def test_a_cell_with_meta_images_among_the_training_images(monkeypatch):
    seen = {}

    class Watched(BilevelLossBalancer):
        def __call__(self, batch, meta_batch):
            seen.setdefault(self.weighting.weight, []).append((batch, meta_batch))
            return super().__call__(batch, meta_batch)

    monkeypatch.setattr(with_meta, "BilevelLossBalancer", Watched)
    names = ["meta images alone", "equal weights", "learned + meta at 0.3", "learned + meta at 1, two fixed parts"]
    found = with_meta.meta_cell({"task": "sources", "seed": 0, "epochs": 1, "methods": names})["found"]
    assert ["meta loss" in found[name] for name in names] == [False, False, True, True]
    for weight, calls in seen.items():
        trained_on = [rows(rows_of(b, (b.columns["from_meta"] == 1).nonzero().flatten())) for b, _ in calls]
        judged = [rows(meta) for _, meta in calls]
        assert all(len(one) <= 50 for one in trained_on)
        assert not any(a & b for a, b in zip(trained_on, judged, strict=True))
        assert bool(set().union(*trained_on) & set().union(*judged)) == (weight == 0.3)


def test_the_tables_follow_the_numbers(tmp_path):
    def one(test):
        return {"validation": test + 1.0, "test": test, "low": 0.5, "high": test / 10}

    cells = [
        {"kind": "rates", "task": task, "seed": seed, "epochs": epochs, "methods": [], "failed": {},
         "found": {"bounded, 0.1": one(80.0 + seed + epochs)}}
        for task in ("sources", "noise") for seed in (0, 2) for epochs in (1, 9)
    ]  # fmt: skip
    cells += [
        {"kind": "meta", "task": "noise", "seed": seed, "epochs": 1, "methods": [],
         "found": {"learned": {"validation": 70.0 + seed, "test": 60.0, "meta loss": 0.25}}}
        for seed in (0, 2)
    ]  # fmt: skip
    settings = {"device": "cpu", "threads": 1, "batch_size": None}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    content = {"command": "python", "environment": about, "settings": settings, "cells": cells}
    (readme,) = table_rates.write(content, tmp_path)
    text = readme.read_text()
    assert "| bounded, 0.1 | 83.00 ± 1.41 | 83.00 ± 1.41 | 83.0 |" in text
    assert "| bounded, 0.1 | 82.00 ± 1.41 | 82.00 ± 1.41 | 82.0 |" in text
    assert "| bounded, 0.1 | 0.50 to 8.30 | 0.50 to 8.30 |" in text
    assert "## 9 epochs" in text and "| bounded, 0.1 | 90.00 ± 1.41; 9.1 | 90.00 ± 1.41; 9.1 |" in text
    assert "| learned | 60.00 ± 0.00; 0.250 | 71.0 |" in text
    assert "- **noise**: 40 % of the labels are another class" in text and "over the seeds 0, 2." in text
