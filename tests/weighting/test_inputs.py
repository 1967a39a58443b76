"""What a weight model refuses, and that the message says what was wrong and what to do."""

import pytest
import torch
from torch import nn

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting import (
    ClassAware,
    ClassTable,
    EntropyGate,
    GroupTable,
    LossMLP,
    Normalised,
    Rectified,
    SampleTable,
    TermScalars,
    entropies,
)
from metakd.weighting.features import evaluate_features, student_and_teacher

X = torch.zeros(3, 1)


def message(function, *args, **kwargs):
    with pytest.raises(MetaKDError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def builders():
    return [
        lambda terms=2, **kw: LossMLP(2, terms, **kw),
        lambda terms=2, **kw: TermScalars(terms, **kw),
        lambda terms=2, **kw: ClassTable(3, terms, **kw),
        lambda terms=2, **kw: SampleTable(3, terms, **kw),
        lambda terms=2, **kw: GroupTable("source", 3, terms, **kw),
    ]


@pytest.mark.parametrize("build", builders())
@pytest.mark.parametrize("output", ["Sigmoid", "relu", "", None])
def test_an_unknown_output_map(build, output):
    found = message(build, output=output)
    assert repr(output) in found and "'sigmoid', 'softplus', 'softmax', 'identity'" in found


@pytest.mark.parametrize("build", [*builders(), Rectified])
@pytest.mark.parametrize("terms", [0, -1, 2.0, True, None, "2"])
def test_terms_that_are_no_count(build, terms):
    found = message(build, terms=terms)
    assert f"terms is {terms!r}" in found and "integer of at least 1" in found


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_sizes_that_are_no_count(bad):
    assert f"features is {bad!r}" in message(LossMLP, bad, 2)
    assert f"hidden[1] is {bad!r}" in message(LossMLP, 2, 2, (4, bad))
    assert f"classes is {bad!r}" in message(ClassTable, bad, 2)
    assert f"samples is {bad!r}" in message(SampleTable, bad, 2)
    assert f"groups is {bad!r}" in message(GroupTable, "source", bad, 2)


@pytest.mark.parametrize("name", [None, 3, "inputs", "teacher", "size", "columns", "term", "weight"])
def test_a_column_that_no_batch_has(name):
    found = message(GroupTable, name, 3, 2)
    assert f"column is {name!r}" in found and 'Batch(columns={"source": ids})' in found


@pytest.mark.parametrize("hidden", [64, None, "64"])
def test_hidden_layers_that_are_no_sequence(hidden):
    found = message(LossMLP, 2, 2, hidden)
    assert f"hidden is {hidden!r}" in found and "hidden=(64,)" in found


@pytest.mark.parametrize("build", builders()[1:])
@pytest.mark.parametrize(
    ("output", "init", "bounds"),
    [
        ("sigmoid", 1.0, "(0, 1)"),
        ("sigmoid", 0.0, "(0, 1)"),
        ("softplus", 0.0, "(0, inf)"),
        ("softplus", -1.0, "(0, inf)"),
        ("softplus", None, "(0, inf)"),
        ("bounded", 0.0, "(0, inf)"),
        ("bounded", float("inf"), "(0, inf)"),
        ("identity", float("nan"), "(-inf, inf)"),
        ("identity", float("inf"), "(-inf, inf)"),
    ],
)
def test_a_start_that_the_map_cannot_give(build, output, init, bounds):
    found = message(build, output=output, init=init)
    assert f"init={init}" in found and repr(output) in found and bounds in found and "change init" in found


TABLES = [
    (ClassTable(3, 2), "batch.targets", lambda rows: Batch(None, targets=rows), "Batch(targets=...)", "class"),
    (SampleTable(3, 2), "batch.index", lambda rows: Batch(None, index=rows), "Batch(index=...)", "training sample"),
    (
        GroupTable("source", 3, 2),
        "batch.columns['source']",
        lambda rows: Batch(None, columns={"source": rows}),
        "(inputs, targets, {'source': ids})",
        "group",
    ),
]
of_tables = pytest.mark.parametrize(("table", "field", "batch_of", "cure", "row"), TABLES)


@of_tables
def test_a_missing_index(table, field, batch_of, cure, row):
    found = message(table, X, Batch(None))
    assert f"{type(table).__name__} needs {field}, which is None" in found and cure in found


def test_a_missing_column_among_others():
    found = message(GroupTable("source", 3, 2), X, Batch(None, columns={"annotator": torch.zeros(3).long()}))
    assert "(the batch has the columns ['annotator'])" in found


@of_tables
def test_an_index_that_is_no_tensor(table, field, batch_of, cure, row):
    assert f"{field}, which is list" in message(table, X, batch_of([0, 1, 2]))


@of_tables
@pytest.mark.parametrize(
    "wrong", [torch.zeros(3), torch.zeros(3).bool(), torch.zeros(2).long(), torch.zeros(3, 1).long()]
)
def test_an_index_that_is_no_row_of_integers(table, field, batch_of, cure, row, wrong):
    found = message(table, X, batch_of(wrong))
    assert f"{field} as integers of shape (3,)" in found
    assert f"got {wrong.dtype} of shape {tuple(wrong.shape)}" in found


@of_tables
@pytest.mark.parametrize("value", [3, 99, -1])
def test_an_index_out_of_range(table, field, batch_of, cure, row, value):
    found = message(table, X, batch_of(torch.tensor([0, value, 2])))
    assert f"{field} {value} is out of range [0, 3)" in found
    assert "the table has 3 rows" in found and f"each {row}" in found


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 1)])
def test_features_of_a_wrong_shape(shape):
    found = message(LossMLP(2, 2), torch.zeros(shape), Batch(None))
    assert f"shape {shape}, expected (B, 2)" in found
    assert ("LossMLP(features=4, ...)" in found) == (shape == (3, 4))


def test_features_of_a_wrong_shape_before_their_number_is_known():
    assert "shape (3,), expected (B, F)" in message(LossMLP(None, 2), torch.zeros(3), Batch(None))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 1)])
def test_an_influence_of_a_wrong_shape(shape):
    found = message(Rectified(2).from_influence, torch.zeros(shape))
    assert f"shape {shape}, expected (B, 2)" in found and "Rectified(terms=...)" in found


@pytest.mark.parametrize("over", ["samples", "", None])
def test_weights_shared_out_over_something_else(over):
    found = message(Rectified, 2, over=over)
    assert repr(over) in found and "'batch'" in found and "'sample'" in found


@pytest.mark.parametrize("activation", [nn.ReLU(), "relu", torch.tanh, None, dict])
def test_an_activation_that_is_no_class_of_modules(activation):
    found = message(LossMLP, 2, 2, activation=activation)
    assert f"activation is {activation!r}" in found and "activation=nn.ReLU" in found


def test_what_cannot_be_normalised():
    assert "got str" in message(Normalised, "mlp")
    table = TermScalars(2, init=-0.5, output="identity")
    found = message(Normalised(table), X, Batch(None))
    assert "the weight -0.5 is negative" in found and "give TermScalars an output" in found


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_gate_without_an_order(low, high):
    found = message(EntropyGate, low, high)
    assert f"low={low}" in found and f"high={high}" in found


@pytest.mark.parametrize("shape", [(3,), (3, 3), (3, 2, 1)])
def test_features_that_are_no_entropies(shape):
    found = message(EntropyGate(), torch.zeros(shape), Batch(None))
    assert f"shape {shape}, expected (B, 2)" in found and "features=weighting.entropies" in found


@pytest.mark.parametrize("features", [entropies, ClassAware([9])])
def test_features_of_a_single_logit(features):
    batch = Batch(None, torch.zeros(3, dtype=torch.int64), teacher=torch.zeros(3, 1))
    assert "the student has 1 output" in message(features, X, torch.zeros(3, 1), batch)


def test_entropies_without_a_teacher():
    assert "batch.teacher is None" in message(entropies, X, torch.zeros(3, 2), Batch(None))


@pytest.mark.parametrize("counts", [[5, 0], [], [[1, 2]], "many", [1, float("nan")]])
def test_class_aware_features_of_counts_that_are_none(counts):
    assert "count" in message(ClassAware, counts)


def test_class_aware_features_of_other_outputs():
    features, batch = ClassAware([9, 3]), Batch(None, torch.tensor([0, 1, 1]), teacher=torch.zeros(3, 2))
    assert "there are 2 class counts but the student has 3 outputs" in message(features, X, torch.zeros(3, 3), batch)
    assert "teacher's outputs have shape (3, 3)" in message(
        features, X, torch.zeros(3, 2), batch._replace(teacher=torch.zeros(3, 3))
    )
    assert "a list of 2 outputs" in message(features, X, torch.zeros(3, 2), batch._replace(teacher=[batch.teacher] * 2))
    labels = Batch(None, torch.tensor([0, 1, 2]), teacher=batch.teacher)
    assert "2" in message(features, X, torch.zeros(3, 2), labels)
    assert "targets" in message(features, X, torch.zeros(3, 2), Batch(None, teacher=batch.teacher))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_features(dtype):
    def spectrum(losses, outputs, batch):
        return outputs

    found = message(evaluate_features, spectrum, torch.zeros(3, 2), torch.zeros(3, 2, dtype=dtype), Batch(None))
    assert "'spectrum' must return real floating-point (B, F) with B = 3" in found
    assert str(dtype) in found and ".abs()" in found and ".real" in found


def test_default_features_where_they_cannot_be_computed():
    labels = torch.zeros(3, dtype=torch.int64)
    for outputs, batch, why in (
        (torch.zeros(3), Batch(None, torch.zeros(3), torch.zeros(3)), "shape (3,)"),
        (torch.zeros(3, 2), Batch(None, torch.zeros(3, 2), torch.zeros(3, 2)), "torch.float32 of shape (3, 2)"),
        (
            torch.zeros(3, 1),
            Batch(None, labels, torch.zeros(3, 1)),
            "cross-entropy and divergences need logits of at least two",
        ),
        (torch.zeros(3, 2), Batch(None, labels, torch.zeros(3, 4, 2)), "list(stacked.unbind(1))) for the shape (B, te"),
        (torch.zeros(3, 2), Batch(None, labels), "batch.teacher is None"),
    ):
        found = message(student_and_teacher, torch.zeros(3, 2), outputs, batch)
        assert why in found and "Pass features=lambda losses, outputs, batch: losses" in found
        assert "meta_loss=" in found
