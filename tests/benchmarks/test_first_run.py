"""The page of the first run says what its records say."""

import json

import pytest

pytest.importorskip("tqdm")  # of the extra "examples"

from benchmarks.common.measure import ROOT
from benchmarks.first_run import page
from examples.cifar_lt_bikd import DIGITS_WITH_SOURCES, WITH_SOURCES

FOLDER = ROOT / "benchmarks" / "results" / "first_run"
RECORDS = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("seed-?.json"))]


def test_the_page_is_made_of_the_records():
    assert [record["seed"] for record in RECORDS] == [0, 1, 2, 3, 4]
    text = (FOLDER / "README.md").read_text()
    assert text == page(RECORDS, WITH_SOURCES) + "\n" + (FOLDER / "notes.md").read_text()


def test_the_records_are_of_the_examples_settings():
    for record in RECORDS:
        assert list(record["runs"]) == ["teacher", *WITH_SOURCES]
        assert {key: record["arguments"][key] for key in DIGITS_WITH_SOURCES} == DIGITS_WITH_SOURCES
