"""What a term refuses, and that the message says what was wrong and what to do."""

import re
from functools import partial

import pytest
import torch

from metakd import terms
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import (
    BalancedSoftmax,
    Bootstrapped,
    CrossEntropy,
    ForwardCorrected,
    GatedSoftTarget,
    GeneralisedCrossEntropy,
    GroupTarget,
    LogitAdjusted,
    NonTargetClass,
    RebalancedSoftTarget,
    ReverseSoftTarget,
    SoftTarget,
    TargetClass,
    WithinGroupTarget,
    logits,
)

Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
COUNTED = [BalancedSoftmax, LogitAdjusted, RebalancedSoftTarget, GroupTarget, WithinGroupTarget]
SOFTENED = [SoftTarget, ReverseSoftTarget, GatedSoftTarget, TargetClass, NonTargetClass]
BOTH = [GatedSoftTarget(), TargetClass(), NonTargetClass()]
ROBUST = [GeneralisedCrossEntropy(), Bootstrapped(), Bootstrapped(hard=True), ForwardCorrected(torch.eye(4))]
LABELED = [CrossEntropy(), *(family([1, 2, 3, 4]) for family in COUNTED[:2]), *BOTH, *ROBUST]
TAUGHT = [SoftTarget(), ReverseSoftTarget(), *(family([1, 2, 3, 4]) for family in COUNTED[2:]), *BOTH]


def message(function, *args, **kwargs):
    with pytest.raises(MetaKDError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("term", LABELED)
def test_missing_targets(term):
    found = message(term, Z, Batch(None, teacher=Z))
    assert "batch.targets is None" in found and "Batch(targets=...)" in found


@pytest.mark.parametrize("term", LABELED)
@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (torch.zeros(3), "torch.float32 of shape (3,)"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool of shape (3,)"),
        (torch.zeros(3, 4), "torch.float32 of shape (3, 4)"),
        (torch.zeros(2, dtype=torch.int64), "torch.int64 of shape (2,)"),
        (torch.zeros(3, 1, dtype=torch.int64), "torch.int64 of shape (3, 1)"),
    ],
)
def test_targets_that_are_no_class_indices(term, targets, got):
    found = message(term, Z, Batch(None, targets, Z))
    assert got in found and "shape (3,)" in found and "(3, 4)" in found and "argmax" in found


def test_targets_that_are_no_tensor():
    found = message(CrossEntropy(), Z, Batch(None, [0, 1, 2]))
    assert "3 class indices" in found and "got list" in found and "torch.as_tensor" in found


@pytest.mark.parametrize("term", LABELED)
@pytest.mark.parametrize("label", [4, 7, -1, -100])
def test_labels_out_of_range(term, label):
    found = message(term, Z, Batch(None, torch.tensor([0, label, 3]), Z))
    assert f"label {label} is out of range [0, 4)" in found and "the student has 4 outputs" in found


def test_targets_on_another_device():
    found = message(CrossEntropy(), Z, Batch(None, torch.zeros(3, dtype=torch.int64, device="meta")))
    assert "batch.targets is on meta" in found and "the student's outputs on cpu" in found


@pytest.mark.parametrize("term", TAUGHT)
def test_a_missing_teacher(term):
    found = message(term, Z, Batch(None, Y))
    assert "batch.teacher is None" in found
    assert "BilevelLossBalancer(..., teacher=...)" in found and "Batch(teacher=...)" in found


@pytest.mark.parametrize("term", TAUGHT)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4)])
def test_a_teacher_of_another_shape(term, shape):
    found = message(term, Z, Batch(None, Y, torch.zeros(shape)))
    assert f"teacher's outputs have shape {shape}" in found and "the student's (3, 4)" in found


@pytest.mark.parametrize("term", TAUGHT)
def test_a_teacher_on_another_device(term):
    found = message(term, Z, Batch(None, Y, torch.zeros(3, 4, device="meta")))
    assert "the teacher's outputs are on meta" in found and "on cpu" in found


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        (torch.zeros(3), "a tensor of shape (3,)"),
        (torch.zeros(3, 4, 2), "a tensor of shape (3, 4, 2)"),
        (torch.zeros(3, 4, dtype=torch.int64), "torch.int64"),
        ((Z, Z), "got tuple"),
        ({"logits": Z}, "got dict"),
        (None, "got NoneType"),
    ],
)
def test_outputs_that_are_no_logits(outputs, got):
    found = message(logits, outputs)
    assert got in found and "(B, C)" in found and "term of your own" in found


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("counts", [[1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_wrong_number_of_counts(family, counts):
    found = message(family(counts), Z, Batch(None, Y, Z))
    assert f"{len(counts)} class counts" in found and "4 outputs" in found


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("bad", [0, -3, float("nan"), float("inf")])
def test_counts_that_are_not_positive(family, bad):
    found = message(family, [5, bad, 7])
    assert f"class 1 has count {bad:g}" in found and "positive and finite" in found


@pytest.mark.parametrize("counts", [[], [[1, 2]], 3, torch.ones(2, 2)])
def test_counts_of_a_wrong_shape(counts):
    assert "expected (C,)" in message(LogitAdjusted, counts)


@pytest.mark.parametrize("counts", ["many", None, ["a", "b"]])
def test_counts_that_are_no_numbers(counts):
    assert "class counts must be numbers" in message(BalancedSoftmax, counts)


@pytest.mark.parametrize("tau", [-1.0, float("nan"), float("inf")])
def test_a_bad_tau(tau):
    assert f"tau is {tau}" in message(LogitAdjusted, [1, 2], tau=tau)


@pytest.mark.parametrize("family", [*SOFTENED, *(partial(family, [1, 2, 3]) for family in COUNTED[2:])])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature(family, temperature):
    found = message(family, temperature=temperature)
    assert f"temperature is {temperature}" in found and "must be positive" in found


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0, float("nan")])
def test_a_bad_label_smoothing(smoothing):
    found = message(CrossEntropy, label_smoothing=smoothing)
    assert f"label_smoothing is {smoothing}" in found and "[0, 1)" in found


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_power(power):
    found = message(SoftTarget, power=power)
    assert f"power is {power}" in found and "must be positive" in found


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0, float("nan")])
def test_a_bad_beta(beta):
    found = message(RebalancedSoftTarget, [1, 2], beta=beta)
    assert f"beta is {beta}" in found and "[0, 1)" in found


@pytest.mark.parametrize("family", [GroupTarget, WithinGroupTarget])
@pytest.mark.parametrize("counts", [[5], [5, 4]])
def test_too_few_classes_for_three_groups(family, counts):
    found = message(family, counts)
    assert "at least three classes" in found and f"there are {len(counts)} counts" in found


SINGLE = [*LABELED[:1], *(family([1]) for family in COUNTED[:3]), *BOTH, SoftTarget(), ReverseSoftTarget()]


@pytest.mark.parametrize("term", SINGLE)
@pytest.mark.parametrize("label", [0, 1])
def test_a_single_logit_is_no_classifier(term, label):
    found = message(term, torch.zeros(3, 1), Batch(None, Y + label, torch.zeros(3, 1)))
    assert "the student has 1 output, but cross-entropy and divergences need" in found and "other class" in found
    assert "F.binary_cross_entropy_with_logits(" in found


def test_the_terms_that_messages_name_are_terms():
    """What stands behind `lambda outputs, batch:` in the messages, on the outputs that they are about."""
    one, dense = torch.randn(3, 1), torch.randn(3, 4, 2, 2)
    cases = [
        (one, Batch(None, Y)),
        (one[:, 0], Batch(None, Y)),
        (dense, Batch(None, torch.zeros(3, 2, 2, dtype=torch.int64))),
        (Z, Batch(None, torch.randn(3, 4))),
    ]
    for outputs, batch in cases:
        text = re.search(r"lambda outputs, batch: F\.\w+\(.*?reduction='none'\)(\.flatten\(1\))?(\.mean\(dim=1\))?",
                         message(CrossEntropy(), outputs, batch))[0]  # fmt: skip
        losses = eval(text, {"F": torch.nn.functional})(outputs, batch)
        assert losses.shape == (3,) and losses.isfinite().all()


ENSEMBLE = [torch.randn(3, 4), torch.randn(3, 4)]


@pytest.mark.parametrize("term", TAUGHT)
@pytest.mark.parametrize("outputs", [ENSEMBLE, tuple(ENSEMBLE)])
def test_the_outputs_of_several_teachers(term, outputs):
    found = message(term, Z, Batch(None, Y, outputs))
    assert f"a {type(outputs).__name__} of 2 outputs" in found and "pick one by" in found
    assert "torch.stack(batch.teacher).mean(dim=0)" in found


def test_the_terms_that_the_message_names_take_several_teachers():
    batch = Batch(None, Y, ENSEMBLE)
    found = message(SoftTarget(), Z, batch)
    first = eval(re.search(r"terms\.FromTeacher\(term, 0\)", found)[0], {"terms": terms, "term": SoftTarget()})
    torch.testing.assert_close(first(Z, batch), SoftTarget()(Z, batch._replace(teacher=ENSEMBLE[0])))
    mean = eval(re.search(r"teacher=(torch.*)$", found)[1], {"torch": torch, "batch": batch})
    torch.testing.assert_close(mean, (ENSEMBLE[0] + ENSEMBLE[1]) / 2)


def test_complex_outputs():
    found = message(logits, torch.zeros(3, 4, dtype=torch.complex64))
    assert "torch.complex64" in found and ".abs()" in found and ".real" in found
