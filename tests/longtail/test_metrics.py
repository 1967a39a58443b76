"""Accuracy by class and by group, against counting by hand."""

import pytest
import torch
from torch import nn

from metakd.errors import MetaKDError
from metakd.longtail import evaluate, group_classes, long_tail_counts

COUNTS = (50, 40, 30, 20, 10, 5)


class Table(nn.Module):
    """Answers input i with the i-th row of logits; dropout shows whether it is in eval mode."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.dropout = logits, nn.Dropout(0.9)

    def forward(self, x):
        return self.dropout(self.logits[x.long()])


def batches(targets, size=7):
    index = torch.arange(len(targets))
    return [(i, targets[i], i) for i in index.split(size)]


def test_scores_against_counting():
    targets = torch.randint(6, (200,))
    logits = torch.randn(200, 6) + 1.5 * nn.functional.one_hot(targets, 6)
    scores = evaluate(Table(logits), batches(targets), group_classes(COUNTS))
    right = (logits.argmax(1) == targets).double()
    by_class = [100 * float(right[targets == c].mean()) for c in range(6)]
    assert scores.overall == pytest.approx(100 * float(right.mean()), abs=1e-3)
    assert scores.per_class == pytest.approx(by_class, abs=1e-3)
    assert scores.many == pytest.approx(sum(by_class[:2]) / 2, abs=1e-3)
    assert scores.medium == pytest.approx(sum(by_class[2:4]) / 2, abs=1e-3)
    assert scores.few == pytest.approx(sum(by_class[4:]) / 2, abs=1e-3)
    assert scores.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    confidence = logits.softmax(1).amax(1)
    bins = (confidence * 15).long()
    gaps = [abs(float((right - confidence)[bins == b].sum())) for b in range(15)]
    assert scores.ece == pytest.approx(100 * sum(gaps) / 200, abs=1e-3)


def test_evaluation_runs_in_eval_mode_and_puts_every_flag_back():
    targets = torch.arange(6).repeat(10)
    model = nn.Sequential(Table(20.0 * nn.functional.one_hot(targets, 6)), nn.BatchNorm1d(6).eval())
    model.train()
    model[1].eval()
    assert evaluate(model, batches(targets), group_classes(COUNTS)).overall == 100
    assert model.training and model[0].dropout.training and not model[1].training


def test_the_field_s_rule_for_cifar100_lt():
    groups = group_classes(long_tail_counts(100, 490, 100))
    counts = long_tail_counts(100, 490, 100)
    assert "over 100" in groups.rule and "under 20" in groups.rule
    assert {counts[c] > 100 for c in groups.many} == {True}
    assert {20 <= counts[c] <= 100 for c in groups.medium} == {True}
    assert {counts[c] < 20 for c in groups.few} == {True}
    assert len(groups.many) + len(groups.medium) + len(groups.few) == 100


@pytest.mark.parametrize(("classes", "sizes"), [(10, (3, 4, 3)), (100, (33, 34, 33)), (3, (1, 1, 1)), (5, (2, 1, 2))])
def test_thirds_where_the_field_s_rule_leaves_a_group_empty(classes, sizes):
    groups = group_classes(long_tail_counts(classes, 4900, 10))
    assert "33/34/33" in groups.rule
    assert (len(groups.many), len(groups.medium), len(groups.few)) == sizes


def test_groups_follow_the_counts_not_the_order_of_the_classes():
    groups = group_classes([5, 900, 40, 300, 60, 7, 80])
    assert groups.many == (1, 3) and groups.few == (5, 0)


def test_too_few_classes():
    with pytest.raises(MetaKDError, match="at least three classes"):
        group_classes([10, 5])
