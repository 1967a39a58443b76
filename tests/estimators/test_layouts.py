"""Tensors of other layouts and kinds: sparse data, sparse gradients, complex numbers."""

import pytest
import torch
import torch.nn.functional as F
import torchopt

from metakd import MetaKDError, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll
from tests.estimators.problems import relative

DOUBLE = torch.float64
EXACT = [Adjoint(), Adjoint("auto"), Unroll(), Truncated(3)]
ONE = [OneStep(), OneStep("reverse"), IdentityJacobian()]
each_exact = pytest.mark.parametrize("estimator", [*EXACT, *ONE], ids=str)
each = pytest.mark.parametrize("estimator", [*EXACT, *ONE, FiniteDifference(), Implicit(damping=20.0)], ids=str)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


X, Y = draw(8, 4).relu(), draw(8, 4, seed=1)


def ridge(estimator, product):
    return hypergradient(
        lambda p, m, b: F.mse_loss(product(p["w"] * m["g"]), Y) + m["l2"] * p["w"].square().sum(),
        lambda p, m: F.mse_loss(X @ p["w"], Y),
        {"w": torch.eye(4, dtype=DOUBLE)},
        {"l2": torch.tensor(0.1, dtype=DOUBLE), "g": torch.linspace(0.5, 1.5, 4, dtype=DOUBLE)},
        range(1 if estimator in ONE else 3),
        optimizer=torchopt.sgd(lr=0.1),
        estimator=estimator,
    ).gradient


LAYOUTS = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "csc": torch.Tensor.to_sparse_csc}


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("product", [torch.matmul, torch.sparse.mm], ids=["matmul", "sparse.mm"])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support:UserWarning")
def test_sparse_data(estimator, layout, product):
    data = LAYOUTS[layout](X)
    found = ridge(estimator, lambda w: product(data, w))
    assert relative(found, ridge(estimator, lambda w: X @ w)) < 1e-12


def test_forward_over_reverse_refuses_by_name_what_it_cannot_do():
    with pytest.raises(MetaKDError, match=r"forward over reverse .*Adjoint\(mode='reverse'\)"):
        ridge(Adjoint("forward"), lambda w: X.to_sparse() @ w)
    with pytest.raises(MetaKDError, match=r"forward over reverse .*Adjoint\(mode='reverse'\)"):
        ridge(Adjoint("forward"), lambda w: X @ w)  # torch's mse_loss, where gradients add up


def embedded(estimator, sparse):
    index = torch.tensor([0, 1, 1, 3])

    def inner(p, m, b):
        return (F.embedding(index, p["w"], sparse=sparse).sin() @ m["g"]).exp().sum()

    return hypergradient(
        inner,
        lambda p, m: p["w"].square().sum(),
        {"w": draw(5, 3)},
        {"g": torch.ones(3, dtype=DOUBLE)},
        range(1 if estimator in ONE else 3),
        optimizer=torchopt.adam(lr=0.01),
        estimator=estimator,
    )


@each
def test_sparse_gradients(estimator):
    found, expected = embedded(estimator, True), embedded(estimator, False)
    assert relative(found.gradient, expected.gradient) < 1e-12
    torch.testing.assert_close(found.params, expected.params)
    torch.testing.assert_close(found.params_gradient, expected.params_gradient)


def complex_problem(estimator, rule, as_real, state=None):
    """A complex layer and a complex meta-parameter; `as_real` writes the same with real tensors."""
    to, back = (torch.view_as_real, torch.view_as_complex) if as_real else (lambda z: z, lambda z: z)
    z = torch.complex(draw(6, 3), draw(6, 3, seed=1))
    target = torch.complex(draw(6, 2, seed=2), draw(6, 2, seed=3))

    def inner(p, m, b):
        residual = z * back(m["phase"]) @ back(p["layer"]["w"]) + p["bias"] - target
        return residual.abs().square().mean() + (back(p["layer"]["w"]).real ** 3).mean()

    def outer(p, m):
        return (z @ back(p["layer"]["w"]) - target).abs().mean() + back(m["phase"]).angle().sum()

    return hypergradient(
        inner,
        outer,
        {
            "layer": {"w": to(torch.complex(draw(3, 2, seed=4), draw(3, 2, seed=5)))},
            "bias": torch.zeros(2, dtype=DOUBLE),
        },
        {"phase": to(torch.complex(torch.ones(3, dtype=DOUBLE), draw(3, seed=6)))},
        range(1 if estimator in ONE else 3),
        optimizer=rule,
        optimizer_state=state,
        estimator=estimator,
    )


RULES = {
    "sgd": torchopt.sgd(lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": torchopt.adam(lr=0.05, eps=1e-3),
    "clip": torchopt.chain(torchopt.clip_grad_norm(max_norm=0.2), torchopt.sgd(lr=0.5)),
}


@each
@pytest.mark.parametrize("rule", RULES)
def test_complex_tensors_are_their_real_parts(estimator, rule):
    found, expected = (complex_problem(estimator, RULES[rule], as_real) for as_real in (False, True))
    assert found.gradient["phase"].is_complex() and found.params["layer"]["w"].is_complex()
    torch.testing.assert_close(torch.view_as_real(found.gradient["phase"]), expected.gradient["phase"])
    torch.testing.assert_close(torch.view_as_real(found.params["layer"]["w"]), expected.params["layer"]["w"])
    torch.testing.assert_close(found.params["bias"], expected.params["bias"])
    torch.testing.assert_close(found.outer_loss, expected.outer_loss)
    if expected.params_gradient is not None:
        start = found.params_gradient["layer"]["w"]
        torch.testing.assert_close(torch.view_as_real(start), expected.params_gradient["layer"]["w"])


def test_complex_parameters_move_as_torch_optim_moves_them():
    z = torch.complex(draw(6, 3), draw(6, 3, seed=1))
    w = torch.complex(draw(3, seed=4), draw(3, seed=5))

    def loss(w):
        return (z @ w).abs().square().mean()

    ours = hypergradient(
        lambda p, m, b: m["scale"] * loss(p["w"]),
        lambda p, m: loss(p["w"]),
        {"w": w},
        {"scale": torch.tensor(1.0, dtype=DOUBLE)},
        range(4),
        optimizer=torchopt.adam(lr=0.05),
    ).params["w"]
    theirs = w.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        loss(theirs).backward()
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("kind", ["returned", "initial"])
def test_a_state_of_complex_parameters_is_taken_again(kind):
    first = complex_problem(Adjoint(), RULES["sgd"], False)
    if kind == "initial":
        params = {
            "layer": {"w": torch.complex(draw(3, 2, seed=4), draw(3, 2, seed=5))},
            "bias": torch.zeros(2, dtype=DOUBLE),
        }
        again = complex_problem(Adjoint(), RULES["sgd"], False, RULES["sgd"].init(params))
        torch.testing.assert_close(again.gradient, first.gradient)
        return
    complex_, real = (
        complex_problem(Adjoint(), RULES["sgd"], as_real, first.optimizer_state) for as_real in (False, True)
    )
    torch.testing.assert_close(torch.view_as_real(complex_.gradient["phase"]), real.gradient["phase"])


def test_a_conjugate_view_is_a_complex_tensor():
    found = hypergradient(
        lambda p, m, b: (m["phi"] * p["w"].abs().square()).sum(),
        lambda p, m: p["w"].imag.sum(),
        {"w": torch.tensor([1 + 2j, 3 - 1j]).conj()},
        {"phi": torch.tensor([1.0, 1.0])},
        [None],
        optimizer=torchopt.sgd(lr=0.1),
    )
    torch.testing.assert_close(found.gradient["phi"], torch.tensor([0.4, -0.2]))
