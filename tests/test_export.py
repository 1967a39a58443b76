"""The exported table holds what the balancer says of each sample, or is refused by name."""

import csv

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import Batch, BilevelLossBalancer, MetaKDError, export_weights, terms, weighting
from tests.test_no_trace import assert_same, trace_of

INPUTS, TARGETS = torch.linspace(-1, 1, 28).view(7, 4), torch.arange(7) % 3


def built(weights=None):
    student = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
    pair = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    return BilevelLossBalancer(
        student, pair, optimizer=torch.optim.SGD(student.parameters(), lr=0.1), weighting=weights
    )


def shuffled():
    order = torch.tensor([5, 1, 0, 6, 2, 4, 3])
    return [(INPUTS[rows], TARGETS[rows], rows) for rows in order.split(3)]


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [{**row, "index": int(row["index"]), "weight": float(row["weight"])} for row in csv.DictReader(file)]
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_each_sample_and_term_has_its_weight(tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    balancer, path = built(), tmp_path / f"weights.{ending}"
    table = export_weights(balancer, shuffled(), path)
    balancer.student.eval()
    expected = balancer.weights((INPUTS, TARGETS))
    rows = rows_of(path)
    assert list(rows[0]) == list(table) == ["index", "term", "weight"] and len(rows) == 14
    assert [row["index"] for row in rows[:4]] == [5, 5, 1, 1]
    for row in rows:
        k = ["hard", "smooth"].index(row["term"])
        assert row["weight"] == pytest.approx(expected[row["index"], k].item(), abs=1e-6)
    assert [list(row.values()) for row in rows] == [list(row) for row in zip(*table.values(), strict=True)]


def test_named_columns_stand_beside_the_index(tmp_path):
    batches = [Batch(*item[:2], index=item[2], columns={"source": item[2] % 2}) for item in shuffled()]
    table = export_weights(built(), batches, tmp_path / "weights.csv")
    assert list(table) == ["index", "source", "term", "weight"]
    assert table["source"] == [index % 2 for index in table["index"]]
    with pytest.raises(MetaKDError, match=r"columns \['source'\], another one \[\]"):
        export_weights(built(), [batches[0], shuffled()[1]], tmp_path / "weights.csv")


def test_without_an_index_the_order_of_the_loader_counts(tmp_path):
    path, data = tmp_path / "weights.csv", TensorDataset(INPUTS, TARGETS)
    table = export_weights(built(), DataLoader(data, batch_size=3), path)
    assert table["index"] == [i for i in range(7) for _ in range(2)]
    with pytest.raises(MetaKDError, match="shuffle=False"):
        export_weights(built(), DataLoader(data, batch_size=3, shuffle=True), path)
    with pytest.raises(MetaKDError, match="shuffle=False"):
        export_weights(built(), DataLoader(data, batch_sampler=[[3, 1], [0]]), path)
    indexed = DataLoader(TensorDataset(INPUTS, TARGETS, torch.arange(7)), batch_size=3, shuffle=True)
    assert sorted(export_weights(built(), indexed, path)["index"]) == table["index"]


def test_labels_are_not_needed(tmp_path):
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    square = {"square": lambda outputs, batch: outputs.square().mean(1)}
    balancer = BilevelLossBalancer(student, square, optimizer=optimizer)
    assert export_weights(balancer, [INPUTS], tmp_path / "weights.csv")["term"] == ["square"] * 7


def test_it_leaves_no_trace_an_error_included(tmp_path):
    balancer = built()
    before = trace_of(balancer.student, balancer.optimizer, balancer.weighting)
    export_weights(balancer, shuffled(), tmp_path / "weights.csv")
    with pytest.raises(MetaKDError, match="'index' of the batch must hold integers"):
        export_weights(balancer, [Batch(INPUTS, TARGETS, index=torch.zeros(7))], tmp_path / "weights.csv")
    assert_same(trace_of(balancer.student, balancer.optimizer, balancer.weighting), before)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batch to read weights of"),
        ([*shuffled(), shuffled()[0]], "3 of 7 samples come more than once, such as index 0, 2 times"),
        ([*shuffled(), (INPUTS, TARGETS)], "3 of 4 batches have an index"),
    ],
)
def test_what_gives_no_table_is_refused_and_no_file_is_written(tmp_path, batches, words):
    with pytest.raises(MetaKDError, match=words):
        export_weights(built(), batches, tmp_path / "weights.csv")
    assert not list(tmp_path.iterdir())


def test_a_wrong_place_is_refused_before_any_weight_is_computed(tmp_path, monkeypatch):
    def never():
        raise AssertionError("the loader was read")
        yield

    for name, words in {"weights.txt": "neither .csv nor .parquet", "none/weights.csv": "no folder"}.items():
        with pytest.raises(MetaKDError, match=words):
            export_weights(built(), never(), tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MetaKDError, match=r"pip install .metakd\[export\]"):
        export_weights(built(), never(), tmp_path / "weights.parquet")


def test_weights_of_one_step_alone_are_refused(tmp_path):
    with pytest.raises(MetaKDError, match="Rectified computes weights from the influence"):
        export_weights(built(weighting.Rectified(2)), shuffled(), tmp_path / "weights.csv")


def test_a_data_set_of_hugging_face_gives_its_rows_in_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    balancer, inputs = built(weighting.SampleTable(100, 2)), torch.randn(100, 4)
    with torch.no_grad():
        balancer.weighting.free.normal_()
    dataset = datasets.Dataset.from_dict({"input": inputs.tolist(), "labels": (torch.arange(100) % 3).tolist()})
    dataset = dataset.add_column("index", list(range(100)))
    table = export_weights(balancer, dataset, tmp_path / "weights.csv")
    assert table["index"] == [i for i in range(100) for _ in "ab"]
    torch.testing.assert_close(torch.tensor(table["weight"]).view(100, 2), balancer.weighting.all_weights())
