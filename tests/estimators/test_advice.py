"""What is said of an operation that cannot be differentiated twice fits this operation, and helps."""

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch.autograd.function import once_differentiable

from metakd import MetaKDError, check_hypergradient, hypergradient
from metakd._autodiff import NoSecondDerivative
from metakd.estimators import Adjoint, FiniteDifference, OneStep
from tests.zoo import cdist_is_once_differentiable

X, Y = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def ctc(z):
    whole = torch.tensor([6]), torch.tensor([2])
    return F.ctc_loss(z.log_softmax(1)[:, None], torch.tensor([[1, 2]]), *whole, reduction="none")


def sparse(z):
    places = torch.arange(6).repeat(2, 1)
    return torch.sparse_coo_tensor(places, z.sum(1), (6, 6), check_invariants=False).to_dense().square().sum(1)


def by_norms(z):
    return torch.linalg.vector_norm(z[:, None] - Y, dim=-1)


def as_to_sparse(z):
    return torch.diag(z.sum(1)).to_sparse().to_dense().square().sum(1)


OPERATIONS = {
    "cdist": (lambda z: torch.cdist(z, Y), "vector_norm(x[:, None] - y, dim=-1)", by_norms),
    "pdist": (torch.pdist, "vector_norm(x[:, None] - x, dim=-1)", None),
    "ctc": (ctc, "the sum over alignments", None),
    "sparse": (sparse, "tensor.to_sparse()", as_to_sparse),
    "marked": (Cube.apply, "without the mark", None),
    "margin": (lambda z: F.multi_margin_loss(z, torch.arange(6) % 4, reduction="none"), "write it as other", None),
}
if not cdist_is_once_differentiable():
    del OPERATIONS["cdist"], OPERATIONS["pdist"]


def problem(operation):
    def inner(p, m, batch):
        return m["scale"] * operation(X @ p["w"]).sin().sum() + (p["w"] * m["shift"]).square().sum()

    def outer(p, m):
        return F.mse_loss(X @ p["w"], Y)

    start = torch.eye(4, dtype=torch.float64) + 0.1
    meta = {"scale": torch.tensor(0.7, dtype=torch.float64), "shift": torch.full((4,), 0.5, dtype=torch.float64)}
    return inner, outer, {"w": start}, meta, range(2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_advice_fits_the_operation_and_helps(name):
    operation, words, other = OPERATIONS[name]
    at, optimizer = problem(operation), torchopt.sgd(lr=0.02)
    with pytest.raises(MetaKDError) as caught:
        hypergradient(*at, optimizer=optimizer, estimator=Adjoint())
    said = str(caught.value)
    assert words in said and said.endswith("or use estimators.FiniteDifference()")
    assert not any(words in said for others, (_, words, _) in OPERATIONS.items() if others != name)
    assert "SDPBackend" not in said
    found = hypergradient(*at, optimizer=optimizer, estimator=FiniteDifference()).gradient
    if other is not None:
        exact = hypergradient(*problem(other), optimizer=optimizer, estimator=Adjoint()).gradient
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
        assert check_hypergradient(*problem(other), optimizer=optimizer).verdict.startswith("exact")


def test_without_forward_mode_the_advice_is_the_same():
    inner, outer, params, meta, _ = problem(OPERATIONS["ctc"][0])
    with pytest.raises(MetaKDError, match=r"the sum over alignments.*, or use estimators\.FiniteDifference\(\)"):
        hypergradient(inner, outer, params, meta, [0], optimizer=torchopt.sgd(lr=0.02), estimator=OneStep())


def test_attention_is_told_its_kernel():
    error = NoSecondDerivative("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented")
    assert "SDPBackend.MATH, or use estimators.FiniteDifference()" in str(error)
