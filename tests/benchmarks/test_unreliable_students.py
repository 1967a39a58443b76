"""The convolutional student of the table of unreliable supervision, and the main rows that it is trained by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("higher")  # of the extra "benchmarks"
pytest.importorskip("sklearn")  # of the extra "examples"

from benchmarks.trust import chosen
from benchmarks.trust.data import parts_of
from benchmarks.trust.presets import PRESETS
from benchmarks.trust.recipes import Recipe, rows_of
from benchmarks.trust.run import Cell, found_by
from benchmarks.trust.settings import Where
from benchmarks.trust.students import network

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DIGITS = replace(PRESETS["digits"], steps=3)
SMALL = replace(DIGITS, student="cnn", hidden=8, few=True)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return Where(None, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def cell(where):
    return Cell("sources", SMALL, 10, 0, where)


def test_the_student_sees_the_images_standardised(where, cell):
    assert cell.task.train.inputs.shape == (10 * DIGITS.per_class, 1, 8, 8)
    seen = torch.cat([part.inputs for part in parts_of(SMALL, 10, 0, *where)])
    assert abs(float(seen.mean())) < 0.1 and abs(float(seen.std()) - 1) < 0.1


def test_both_students_are_given_the_same_samples_and_labels(where, cell):
    other = Cell("sources", DIGITS, 10, 0, where).task
    for own, features in ((cell.task.train, other.train), (cell.task.meta, other.meta)):
        assert torch.equal(own.targets, features.targets)
    assert torch.equal(cell.task.right, other.right)


def test_the_student_is_drawn_by_the_seed(cell):
    first, again, other = (network(cell.task, SMALL, seed) for seed in (3, 3, 4))
    assert sum(isinstance(layer, nn.Conv2d) for layer in first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("name", rows_of("sources", few=True))
def test_every_main_row_can_be_run(cell, name):
    found = found_by(cell, rows_of("sources", few=True)[name][-1])
    assert 0 < found["test"] <= 100 and json.dumps(found)
    assert ("auc of weights" in found) == chosen.is_ours(name)


def test_a_student_learns_the_images(where):
    preset = replace(SMALL, steps=60, hidden=16)
    assert found_by(Cell("sources", preset, 10, 0, where), Recipe("oracle", meta=1.0))["test"] > 70


def test_the_main_rows_are_rows_of_the_table_and_have_the_step_of_a_table():
    few, every = rows_of("annotators", few=True), rows_of("annotators")
    known = [v for variants in every.values() for v in variants]
    assert few.keys() < every.keys() and all(v in known for variants in few.values() for v in variants)
    for name in ("CE + meta", "GCE + meta", "trimming + meta", "agreement + meta", chosen.ORACLE):
        assert any(v.scale == 2.0 and v.meta == 0.3 for v in few[name]), name


@pytest.mark.parametrize(("preset", "folder"), [("small", ""), ("digits", "-digits"), ("cnn", "-cnn")])
def test_the_records_are_of_the_presets(preset, folder):
    cells = json.loads((RESULTS / f"unreliable{folder}" / "results.json").read_text())["cells"]
    assert {str(cell["protocol"]) for cell in cells} == {str(PRESETS[preset].protocol())}
