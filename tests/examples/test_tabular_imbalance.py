"""The tabular example: its rows are apart, its teacher enters as it is, and a small run writes what it says."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.model_selection import cross_val_predict
from torch import nn

from metakd import Batch

PATH = Path(__file__).parents[2] / "examples" / "tabular_imbalance.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("tabular_imbalance", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain(example):
    return example.cut(0)[0]


def rows(batch):
    return {tuple(row) for row in batch.inputs.tolist()}


def test_no_row_has_two_uses(example, plain):
    counts = {name: tuple(batch.targets.bincount().tolist()) for name, batch in plain.items()}
    assert counts == {"train": (12, 237), "meta": (10, 10), "validation": (30, 30), "test": (80, 80)}
    assert len(set().union(*map(rows, plain.values()))) == sum(map(sum, counts.values()))


def test_the_controls_train_on_the_meta_rows_too_and_all_else_is_the_same(example, plain):
    more = example.cut(0, with_meta=True)[0]
    assert more["train"].targets.bincount().tolist() == [22, 247]
    assert rows(more["meta"]) < rows(more["train"])
    for name, batch in plain.items():
        assert torch.equal(more[name].targets[: len(batch.targets)], batch.targets)
    inputs = torch.cat([plain["train"].inputs, plain["meta"].inputs])
    scaled = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    torch.testing.assert_close(more["train"].inputs, scaled, rtol=1e-4, atol=1e-5)


def test_test_rows_are_those_of_every_seed(example, plain):
    other = example.cut(1)[0]
    assert torch.equal(other["test"].targets, plain["test"].targets)
    unscaled = [one["test"].inputs[:, 0].argsort() for one in (plain, other)]
    assert torch.equal(*unscaled)
    assert not torch.equal(*(one["meta"].inputs for one in (plain, other)))


def test_the_teachers_probabilities_enter_as_given(example, plain, monkeypatch):
    probabilities = []

    def twice(trees, x, y, method):
        probabilities.append(cross_val_predict(trees, x, y, method="predict_proba"))
        return cross_val_predict(trees, x, y, method=method)

    monkeypatch.setattr(example, "cross_val_predict", twice)
    train = example.cut(0)[0]["train"]
    assert torch.equal(train.teacher, plain["train"].teacher)
    np.testing.assert_allclose(train.teacher.softmax(1), probabilities[0], rtol=1e-4, atol=1e-7)

    student, balancer = example.train("bikd", plain, seed=0, epochs=1, lr=0.01, weight_lr=0.01)
    balancer.loss(plain["train"])
    q = student(plain["train"].inputs).detach().double().softmax(1).numpy()
    expected = entropy(probabilities[0], q, axis=1)
    np.testing.assert_allclose(balancer.report.losses[:, 1], expected, rtol=1e-3, atol=1e-6)


def test_scores_are_those_of_scikit_learn(example):
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 2), torch.arange(40) % 2
    found = example.scores(nn.Identity(), Batch(logits, targets))
    assert found["accuracy"] == pytest.approx(100 * balanced_accuracy_score(targets, logits.argmax(1)), abs=1e-3)
    assert found["loss"] == pytest.approx(log_loss(targets, logits.double().softmax(1)), rel=1e-5)


def test_test_rows_decide_nothing(example, plain):
    test = plain["test"]
    flipped = plain | {"test": test._replace(targets=1 - test.targets)}
    records = [example.best("bskd", batches, seed=0, epochs=2)[0] for batches in (plain, flipped)]
    assert records[0]["test"] != records[1]["test"]
    assert all(records[0][key] == records[1][key] for key in ("setting", "validation"))


@pytest.mark.slow
def test_a_small_run(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)])
    example.main()
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record.keys() > {"command", "versions", "hardware", "seeds", "epochs"}
    assert set(record["methods"]) == {*example.METHODS, "trees", "trees + meta"}
    table = capsys.readouterr().out.splitlines()
    for line, (name, runs) in zip(table[2:], record["methods"].items(), strict=True):
        assert len(runs) == 1 and all(math.isfinite(value) for value in runs[0]["test"].values())
        mean, _, _, better = line.removeprefix(name).split()[:4]
        assert float(mean) == pytest.approx(runs[0]["test"]["accuracy"], abs=0.006)
        assert better == f"({int(record['methods']['bikd'][0]['test']['accuracy'] > runs[0]['test']['accuracy'])})"
    for method in example.METHODS:
        assert record["methods"][method][0]["setting"].keys() >= {"lr"}
    with Image.open(tmp_path / "tabular_imbalance.png") as picture:
        assert picture.size == (1260, 960)
