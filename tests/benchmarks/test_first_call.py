"""The benchmark of the first call: it times calls with and without the proof; the report says what was measured."""

import pytest

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import first_call
from benchmarks.common.first import METHODS, STEADY, first_cell


@pytest.mark.slow
def test_the_first_call_is_the_one_with_the_proof():
    cell = {"case": "convnet4", "batch_size": 4, "device": "cpu", "clock": "cpu", "repeats": 3, "seconds": 60.0}
    rounds = first_cell(cell)["rounds"]
    assert len(rounds) == 3
    assert all(set(one) == {"plain", *METHODS} and len(one["plain"]) == 2 * STEADY for one in rounds)
    least = {name: min(one[name] for one in rounds) for name in METHODS}
    with_proof = least.pop("first, verify=True")
    assert with_proof > 1.5 * max(least.values())


def test_the_table_follows_the_numbers(tmp_path):
    rounds = [
        {"plain": [0.1], **{name: share * first for name, share in zip(METHODS, (1, 0.3, 0.5, 0.3), strict=True)}}
        for first in (1.0, 1.2)
    ]
    cell = {"kind": "first", "case": "resnet20", "repeats": 2, "seconds": 1.0, "rounds": rounds}
    settings = {"device": "cpu", "threads": 1, "batch_size": None, "clock": "cpu"}
    about = {"versions": {"torch": "2"}, "processor": "a processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    content = {"command": "python", "environment": about, "settings": settings, "cells": [cell]}
    (readme,) = first_call.write(content, tmp_path)
    text = readme.read_text()
    assert "| resnet20 | 100 | 100 (100 to 100) | 2 |" in text
    assert "| resnet20 | 11.00 (10.00 to 12.00) | 3.30 (3.00 to 3.60) | 5.50 (5.00 to 6.00) |" in text
    assert "1 thread; all times are CPU time" in text
