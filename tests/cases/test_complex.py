"""Complex parameters."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from metakd import BilevelLossBalancer, check_hypergradient, estimators, hypergradient
from tests.cases.real_optimizers import ESTIMATORS, TERMS, Build, Case, assert_right, training_data
from tests.cases.real_steps import data


class Spectral(nn.Module):
    """Mixes frequencies by complex weights; the outputs are real."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.randn((), dtype=torch.complex128))
        self.head = nn.Linear(10, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(x) @ self.mix + self.shift
        return self.head(torch.cat([z.real.tanh(), (z * z.conj()).real.sqrt()], dim=1))


def spectral(kind: Any = torch.optim.SGD, warm: int = 0, **options: Any) -> Build:
    def build() -> Case:
        torch.manual_seed(1)
        student = Spectral()
        optimizer = kind(student.parameters(), lr=0.05, **options)
        for batch in training_data(warm)[0]:
            F.cross_entropy(student(batch.inputs), batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Case(student, [optimizer])

    return build


@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_complex_parameters(mode):
    balancer = assert_right(spectral(), estimator=estimators.OneStep(mode))
    assert balancer.student.mix.dtype == torch.complex128
    assert_right(spectral(), estimator=estimators.FiniteDifference(), tolerance=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_complex_parameters_over_several_steps(estimator):
    assert_right(spectral(), estimator=estimator)
    assert_right(spectral(), 2, estimator=estimator)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1, "eps": 0.01}),
        (torch.optim.AdamW, {"amsgrad": True, "eps": 0.01}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_mirror_of_complex_parameters(kind, options, warm):
    build = spectral(kind, warm, **options)
    for estimator in (estimators.OneStep("forward"), estimators.OneStep("reverse"), *ESTIMATORS):
        assert_right(build, inner="mirror", estimator=estimator)
    for estimator in ESTIMATORS:
        assert_right(build, 2, inner="mirror", estimator=estimator)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_default_weight_model_beside_complex_parameters_is_real(dtype):
    real = dtype.to_real()
    torch.manual_seed(1)
    student = Spectral()
    for module in student.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to(dtype if p.is_complex() else real))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, inner="mirror")
    assert {p.dtype for p in balancer.weighting.parameters()} == {real}
    batch, meta_batch = (b._replace(inputs=b.inputs.to(real)) for b in data())
    before = student.mix.detach().clone()
    balancer(batch, meta_batch).backward()
    assert balancer.report.weights.dtype == real and balancer.report.influence.dtype == real
    optimizer.step()
    assert not torch.equal(student.mix, before)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    assert check_hypergradient(balancer, [batch, batch], meta_batch, estimator=estimators.Adjoint()).verdict.startswith(
        "exact"
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_in_a_check_of_two_functions(dtype, estimator):
    """The check casts them to double precision, as it does real ones."""
    x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, dtype=dtype.to_real())
    params = {"w": torch.randn(4, dtype=dtype)}
    phi = {"weights": torch.ones(6, dtype=dtype.to_real()), "scale": torch.randn(4, dtype=dtype)}

    def inner(p, m, batch):
        return (m["weights"] * (batch @ (p["w"] * m["scale"]) - y).abs().square()).mean()

    def outer(p, m):
        return ((x.to(p["w"].dtype) @ p["w"]).real - y).square().mean()

    at = (inner, outer, params, phi, [x] * 3)
    for optimizer in (torchopt.sgd(lr=0.1), torchopt.adam(lr=0.1)):
        assert check_hypergradient(*at, optimizer=optimizer, estimator=estimator).verdict.startswith("exact")
        found = hypergradient(*at, optimizer=optimizer, estimator=estimator, verify=True)
        assert {name: g.dtype for name, g in found.gradient.items()} == {name: t.dtype for name, t in phi.items()}
