"""The record and the table of a run."""

import json
import sys

import pytest
import torch

from metakd.longtail import Images, LongTailed, Run, Scores, summary, table, write_report


@pytest.fixture
def data():
    targets = torch.arange(3).repeat_interleave(40)
    images = torch.randint(0, 256, (120, 1, 4, 4), dtype=torch.uint8)
    return LongTailed.cut(
        Images("toys", "toy images", ("a", "b", "c"), images, targets, images, targets),
        3,
        batch_size=10,
        validation_per_class=4,
    )


def run(overall):
    history = [
        {
            "epoch": e,
            "seconds": 1.5,
            "train_loss": 1.0 / e,
            "test_loss": 1.0,
            "test_accuracy": 50.0,
            "validation_accuracy": 40.0,
        }
        for e in (1, 2)
    ]
    return Run(history, Scores(overall, 90.0, 70.0, 20.25, (90.0, 70.0, 20.25), 0.7, 5.0))


def test_report_holds_command_data_groups_and_every_number(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/x.py", "--output", "my runs"])
    runs = {"teacher": run(70.0), "kd": run(60.125)}
    written = write_report(tmp_path, runs, data, arguments={"seed": 3, "output": tmp_path})
    assert [path.name for path in written] == ["results.json", "training_curves.png", "class_accuracy.png"]
    assert all(path.stat().st_size > 0 for path in written)
    record = json.loads(written[0].read_text())
    assert record["command"] == "python examples/x.py --output 'my runs'"
    assert record["seed"] == 3 and record["arguments"]["output"] == str(tmp_path)
    assert record["data"]["description"] == data.describe()
    assert record["data"]["counts"] == [36, 20, 12] and record["data"]["classes"] == ["a", "b", "c"]
    assert record["groups"] == {"rule": record["groups"]["rule"], "many": [0], "medium": [1], "few": [2]}
    assert "33/34/33" in record["groups"]["rule"] and "last epoch" in record["accuracy"]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    kd = record["runs"]["kd"]
    assert kd["seconds"] == 3.0 and kd["history"] == runs["kd"].history
    assert kd["last_epoch"]["overall"] == 60.125 and kd["last_epoch"]["per_class"] == [90.0, 70.0, 20.25]


def test_summary_names_the_data_the_epoch_and_the_rule(data):
    text = summary({"kd": run(60.125)}, data)
    assert "last epoch" in text and "toy images" in text and "33/34/33" in text
    assert text.splitlines()[3].split() == ["kd", "60.12", "90.00", "70.00", "20.25", "3.00"]


def test_table_columns_line_up():
    lines = table({"a": {"overall": 1.0, "few": 100.0}, "longer": {"overall": 22.22, "few": 3.0}}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["overall", "few"]
