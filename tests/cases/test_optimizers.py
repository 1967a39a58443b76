"""Optimizers without a learning rate, and several of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

from metakd import MetaKDError, estimators
from metakd.terms import CrossEntropy
from tests.cases.real_optimizers import (
    ESTIMATORS,
    Build,
    Case,
    assert_right,
    balanced,
    descent,
    mlp,
    real_meta_loss,
    seeded,
    training_data,
)
from tests.cases.real_steps import data


class OwnRate(torch.optim.Optimizer):
    """As Hugging Face's Adafactor, which finds its own learning rate."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("options", "found"), [({"lr": None}, "lr=None"), ({"eps": 1e-3}, "no 'lr'")])
def test_an_optimizer_without_a_learning_rate(options, found):
    def build() -> Case:
        student = seeded(mlp)
        return Case(student, [OwnRate(student.parameters(), **options)])

    with pytest.raises(MetaKDError, match=rf"group 0 of OwnRate has {found}, .*inner="):
        balanced(build())
    inner = torchopt.sgd(lr=0.3)
    for steps in (1, 2):
        balancer = assert_right(build, steps, inner=inner, steppers=lambda optimizers: descent(optimizers, lr=0.3))
    batch, meta_batch = data()
    balancer(batch, meta_batch)
    assert balancer.report.influence.any()


def iteration_in_float64(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """Newton and Schulz's iteration as torch.optim.Muon writes it, but without rounding to bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def with_muon(warm: int = 0, warm_up: bool = False) -> Build:
    """Muon for the matrices and AdamW for the rest; Muon's scheduler begins with 0, if asked for."""

    def build() -> Case:
        student = seeded(mlp)
        muon = torch.optim.Muon([p for p in student.parameters() if p.ndim == 2], lr=0.1, weight_decay=0.1)
        adamw = torch.optim.AdamW([p for p in student.parameters() if p.ndim < 2], lr=0.05, eps=0.01)
        if warm_up:
            torch.optim.lr_scheduler.LambdaLR(muon, lambda epoch: float(epoch > 0))
        for batch in training_data(warm)[0]:
            F.cross_entropy(student(batch.inputs), batch.targets).backward()
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
        return Case(student, [muon, adamw])

    return build


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_muon_beside_adamw(inner, warm, warm_up, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    build = with_muon(warm, warm_up)
    for estimator in (estimators.OneStep("forward"), estimators.OneStep("reverse"), *ESTIMATORS):
        assert_right(build, inner=inner, estimator=estimator)
    for estimator in ESTIMATORS:
        assert_right(build, 2, inner=inner, estimator=estimator)


@needs_muon
def test_the_mirror_of_muon_forecasts_the_real_step():
    batch, meta_batch = data()
    balancer = balanced(with_muon(2)(), inner="mirror")
    balancer(batch, meta_batch)
    real = real_meta_loss(with_muon(2), [balancer.report.weights], [batch], meta_batch, tuple)
    torch.testing.assert_close(balancer.report.meta_loss, real, rtol=1e-3, atol=1e-3)  # torch rounds to bfloat16


@needs_muon
@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_a_warm_up_from_zero_of_one_of_two_optimizers(inner, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    case = with_muon()()
    muon, adamw = case.optimizers
    scheduler = torch.optim.lr_scheduler.LambdaLR(muon, lambda epoch: 0.5 * epoch)
    balancer, (batch, meta_batch) = balanced(case, inner=inner), data()
    influences = []
    for epoch in range(3):
        assert muon.param_groups[0]["lr"] == 0.05 * epoch
        loss = balancer(batch, meta_batch)
        influences.append(balancer.report.influence)
        assert balancer.report.skipped is None and influences[-1].any()
        for optimizer in case.optimizers:
            optimizer.zero_grad()
        loss.backward()
        before = case.student[0].weight.detach().clone()
        for optimizer in case.optimizers:
            optimizer.step()
        real = CrossEntropy()(case.student(meta_batch.inputs), meta_batch).detach().mean()
        assert torch.equal(before, case.student[0].weight) == (epoch == 0)
        if inner == "mirror":
            torch.testing.assert_close(balancer.report.meta_loss, real, rtol=1e-9, atol=1e-9)
        scheduler.step()
    adamw.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = 0.0
    balancer(batch, meta_batch)
    assert "learning rate is 0" in balancer.report.skipped
