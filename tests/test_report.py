"""The report's numbers for loggers."""

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, Report, estimators, terms

BATCH = (torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4), torch.arange(8) % 3)
PAIR = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}


@pytest.fixture
def balancer():
    student = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return BilevelLossBalancer(student, PAIR, optimizer=optimizer, estimator=estimators.Adjoint())


def test_every_number_there_is(balancer):
    balancer(BATCH, BATCH)
    report = balancer.report
    by_sample = {"weight": report.weights, "loss": report.losses, "influence": report.influence}
    expected = {f"{n}/{t}": v[:, k].mean().item() for n, v in by_sample.items() for k, t in enumerate(PAIR)}
    expected |= {"meta_loss": report.meta_loss.item(), "hypergradient_norm": report.hypergradient_norm.item()}
    found = report.scalars()
    assert list(found) == list(expected) and all(type(value) is float for value in found.values())
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_a_step_has_not_is_left_out(balancer):
    pair = {f"{name}/{term}" for name in ("weight", "loss") for term in PAIR}
    balancer.loss(BATCH)
    assert set(balancer.report.scalars()) == pair
    assert set(balancer.meta_step([BATCH], BATCH).scalars()) == pair | {"meta_loss", "hypergradient_norm"}
    for group in balancer.optimizer.param_groups:
        group["lr"] = 0.0
    assert set(balancer.meta_step([BATCH], BATCH).scalars()) == pair
    balancer(BATCH, BATCH)
    assert balancer.report.skipped and set(balancer.report.scalars()) == pair


def test_one_transfer_from_the_device(balancer, monkeypatch):
    balancer(BATCH, BATCH)
    calls = []
    for name in ("tolist", "item", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name, f=original: calls.append(name) or f(self))
    balancer.report.scalars()
    assert calls == ["tolist"]


def test_terms_without_names_are_counted_and_half_precision_is_averaged_in_float32():
    weights = torch.tensor([[1.0, 2.0], [1.0, 2.0009765625]]).bfloat16().repeat(500, 1)
    losses = torch.full((1000, 2), 60000.0, dtype=torch.float16)
    found = Report(losses, weights, meta_loss=torch.tensor(0.5)).scalars()
    assert found == {"weight/0": 1.0, "weight/1": 2.0, "loss/0": 60000.0, "loss/1": 60000.0, "meta_loss": 0.5}
