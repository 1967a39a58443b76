"""Sparse gradients, sparse matrices in the student, sparse inputs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from metakd import Batch, MetaKDError, check_hypergradient, estimators, hypergradient
from tests.cases.real_optimizers import TERMS, Build, Case, assert_right, balanced, seeded, sgd, training_data
from tests.cases.real_steps import data


class Words(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.words, self.head = layer(7, 6, sparse=True), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x.mul(2).long().clamp(-3, 3) + 3)
        return self.head(found.sum(1) if found.ndim == 3 else found)


def words(layer: Any = nn.Embedding, kind: Any = None, **options: Any) -> Build:
    def build() -> Case:
        student = seeded(lambda: Words(layer))
        if kind is None:
            return Case(student, [torch.optim.SGD(student.parameters(), lr=0.2, **options)])
        matrix = kind(student.words.parameters(), lr=0.05)
        return Case(student, [matrix, torch.optim.AdamW(student.head.parameters(), lr=0.1)])

    return build


@pytest.mark.parametrize("estimator", [estimators.OneStep("forward"), estimators.OneStep("reverse")])
def test_sparse_gradients(estimator):
    assert_right(words(), estimator=estimator)
    assert_right(words(kind=torch.optim.SparseAdam), estimator=estimator)
    assert_right(words(), inner="mirror", estimator=estimator)


def test_bags_have_finite_differences_alone():
    with pytest.raises(MetaKDError, match=r"words \(EmbeddingBag\): .*FiniteDifference\(\)"):
        balanced(words(nn.EmbeddingBag)())
    for kind in (None, torch.optim.SparseAdam):
        assert_right(words(nn.EmbeddingBag, kind), estimator=estimators.FiniteDifference(), tolerance=1e-4)


@pytest.mark.parametrize("estimator", [estimators.Adjoint(), estimators.Unroll()])
def test_sparse_gradients_over_several_steps(estimator):
    assert_right(words(kind=torch.optim.SparseAdam), 2, estimator=estimator)
    assert_right(words(), 2, inner="mirror", estimator=estimator)


def test_a_mirror_of_sparse_adam_is_refused_by_name():
    with pytest.raises(MetaKDError, match=r"cannot follow SparseAdam.*inner='sgd'"):
        balanced(words(kind=torch.optim.SparseAdam)(), inner="mirror")


def test_the_students_own_gradient_stays_sparse():
    case = words(kind=torch.optim.SparseAdam)()
    balancer, ((batch,), meta_batch) = balanced(case, accumulate=9), training_data(1)
    loss = balancer(batch, meta_batch)
    loss.backward()
    assert case.student.words.weight.grad.is_sparse
    outputs = case.student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in TERMS.values()], dim=1)
    (expected,) = torch.autograd.grad((balancer.report.weights * losses).sum() / 5, [case.student.words.weight])
    torch.testing.assert_close(case.student.words.weight.grad.to_dense(), expected.to_dense())
    for optimizer in case.optimizers:
        optimizer.step()


LAYOUTS = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.to_sparse_csr()}
PRODUCTS = {"matmul": torch.matmul, "sparse.mm": torch.sparse.mm, "operator": lambda a, b: a @ b}


def in_layout(t: Tensor, layout: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta
        return LAYOUTS[layout](t)


class OnAMatrix(nn.Module):
    """A graph network whose normalised adjacency is a sparse buffer; its inputs are the numbers of nodes."""

    def __init__(self, layout: str, product: str, *, buffer: bool = True) -> None:
        super().__init__()
        drawn = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        adjacency = in_layout(drawn * (drawn > 0.3), layout)
        self.product = PRODUCTS[product]
        if buffer:
            self.register_buffer("adjacency", adjacency)
        else:
            self.adjacency = adjacency
        self.register_buffer("features", torch.randn(9, 4, dtype=torch.float64))
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, nodes: Tensor) -> Tensor:
        h = torch.tanh(self.product(self.adjacency, self.first(self.features)))
        return self.second(self.product(self.adjacency, h))[nodes]


NODES = [Batch(torch.arange(5), data()[0].targets)], Batch(torch.arange(3, 9), data()[1].targets)


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_with_a_sparse_matrix_of_the_student(layout, product, buffer):
    def build() -> Case:
        torch.manual_seed(1)
        return sgd(OnAMatrix(layout, product, buffer=buffer))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reverse mode takes its place")
        for estimator in (estimators.OneStep(), estimators.OneStep("reverse")):
            balancer = assert_right(build, given=NODES, estimator=estimator)
        assert balancer.student.adjacency.layout == in_layout(torch.eye(2), layout).layout
        (batch,), meta_batch = NODES
        for estimator in (estimators.Adjoint(), estimators.Unroll()):
            assert_right(build, 2, given=([batch, meta_batch], meta_batch), estimator=estimator)
        assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


class BagOfWords(nn.Module):
    def __init__(self, product: str) -> None:
        super().__init__()
        self.product, self.first, self.head = PRODUCTS[product], nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.product(x, self.first)))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs(layout, product):
    batch, meta_batch = (Batch(in_layout(b.inputs * (b.inputs > -0.3), layout), b.targets) for b in data())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reverse mode takes its place")
        build = lambda: sgd(seeded(lambda: BagOfWords(product)))  # noqa: E731
        for estimator in (estimators.OneStep(), estimators.OneStep("reverse")):
            balancer = assert_right(build, given=([batch], meta_batch), estimator=estimator)
        assert_right(build, 2, given=([batch, meta_batch], meta_batch))
        assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_products_in_hypergradient(layout):
    batch, meta_batch = data()
    x = in_layout(batch.inputs, layout)
    params = {"w": torch.randn(4, 3, dtype=torch.float64)}
    phi = {"weights": torch.ones(5, dtype=torch.float64), "decay": torch.tensor(0.1, dtype=torch.float64)}

    def inner(p, m, b):
        losses = F.cross_entropy(x @ p["w"], batch.targets, reduction="none")
        return (m["weights"] * losses).mean() + m["decay"] * p["w"].square().sum()

    def outer(p, m):
        return F.cross_entropy(meta_batch.inputs @ p["w"], meta_batch.targets)

    at = (inner, outer, params, phi, range(3))
    for estimator in (estimators.Adjoint(), estimators.Unroll()):
        found = check_hypergradient(*at, optimizer=torchopt.sgd(lr=0.3), estimator=estimator)
        assert found.verdict.startswith("exact")
        assert hypergradient(*at, optimizer=torchopt.sgd(lr=0.3), estimator=estimator, verify=True).params_gradient
