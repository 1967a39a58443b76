"""`Implicit` against closed forms, against unrolling to the optimum, and its error against the solver's steps."""

import pytest
import torch
import torchopt

from metakd import BilevelLossBalancer, MetaKDError, hypergradient, terms, weighting
from metakd.estimators import Adjoint, Implicit
from tests.estimators.problems import most_kept
from tests.zoo import meet

A = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(estimator, steps=1, damping_in_loss=0.0):
    """inner = theta' A theta / 2 - theta' B phi, with its optimum at A^-1 B phi; outer = C' theta + |phi|^2 / 2."""
    a = A + damping_in_loss * torch.eye(3, dtype=A.dtype)

    def inner(p, m, batch):
        theta = torch.cat([p["pair"].flatten(), p["one"].reshape(1)])
        return theta @ a @ theta / 2 - theta @ B @ m["phi"]

    return hypergradient(
        inner,
        lambda p, m: C[:2] @ p["pair"].flatten() + C[2] * p["one"] + m["phi"].pow(2).sum() / 2,
        {"pair": torch.zeros(1, 2, dtype=A.dtype), "one": torch.tensor(0.0, dtype=A.dtype)},
        {"phi": torch.tensor([0.3, -0.7], dtype=A.dtype)},
        [None] * steps,
        optimizer=torchopt.sgd(lr=0.25),
        estimator=estimator,
    ).gradient["phi"]


def closed_form(a=A):
    return B.T @ torch.linalg.solve(a, C) + torch.tensor([0.3, -0.7], dtype=A.dtype)


@pytest.mark.parametrize("estimator", [Implicit(), Implicit("cg", steps=3), Implicit("neumann", steps=400)], ids=str)
def test_a_quadratic_has_a_closed_form(estimator):
    torch.testing.assert_close(quadratic(estimator), closed_form(), rtol=1e-10, atol=1e-10)


def test_it_is_what_unrolling_to_the_optimum_tends_to():
    errors = [(quadratic(Adjoint(), steps=k) - quadratic(Implicit())).norm().item() for k in (20, 40, 200)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 1e-10


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_the_error_falls_with_the_solvers_steps(solver):
    errors = [(quadratic(Implicit(solver, steps=n)) - closed_form()).norm().item() for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert (errors[2] < 1e-12) == (solver == "cg")


def test_damping_is_a_quadratic_penalty_that_the_loss_does_not_show():
    damped = closed_form(A + 0.5 * torch.eye(3, dtype=A.dtype))
    torch.testing.assert_close(quadratic(Implicit(damping=0.5)), damped, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(quadratic(Implicit(), damping_in_loss=0.5), damped, rtol=1e-10, atol=1e-10)


def logistic(estimator, steps):
    """Ridge-penalised logistic regression with a weight a sample: phi are the weights' logits."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randint(2, (12,), generator=generator).double()
    meta_x, meta_y = torch.randn(9, 4, generator=generator).double(), torch.ones(9).double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(p, m, rows):
        losses = entropy(x[rows] @ p["w"], y[rows], reduction="none")
        return (m["phi"][rows].sigmoid() * losses).mean() + 0.1 * p["w"].pow(2).sum()

    return hypergradient(
        inner,
        lambda p, m: entropy(meta_x @ p["w"], meta_y),
        {"w": torch.zeros(4, dtype=torch.float64), "unused": torch.ones(2, dtype=torch.float64)},
        {"phi": torch.linspace(-1, 1, 12, dtype=torch.float64)},
        [slice(None)] * steps,
        optimizer=torchopt.sgd(lr=1.0),
        estimator=estimator,
    ).gradient["phi"]


@pytest.mark.parametrize("estimator", [Implicit(), Implicit("neumann", steps=300)], ids=str)
def test_at_a_models_optimum_it_is_adjoint(estimator):
    torch.testing.assert_close(logistic(estimator, 150), logistic(Adjoint(), 150), rtol=1e-8, atol=1e-12)


def test_the_loss_is_the_mean_over_the_batches():
    """One batch pulls by phi, twice; the other by 4 phi: the optimum is at 2 phi."""
    found = hypergradient(
        lambda p, m, pull: (p["w"] ** 2 / 2 - pull * m["phi"] * p["w"]).sum(),
        lambda p, m: p["w"].sum(),
        {"w": torch.zeros(2)},
        {"phi": torch.ones(2)},
        [1.0, 4.0, 1.0],
        optimizer=torchopt.sgd(lr=0.1),
        estimator=Implicit(),
    )
    torch.testing.assert_close(found.gradient["phi"], torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("batches", "distinct"),
    [
        (["a"] * 6 + ["b"], 2),
        ([("a", 1), ("a", 2), ("a", 1)], 2),
        ([1, 1.0, True, 1], 3),
        ([torch.ones(1)] * 4, 1),
        ([torch.ones(1) for _ in range(3)], 3),
        (range(4), 4),
    ],
)
def test_a_batch_given_many_times_is_evaluated_once(batches, distinct):
    calls = []

    def inner(p, m, batch):
        calls.append(id(batch) if isinstance(batch, torch.Tensor) else (type(batch), batch))
        return (p["w"] - m["phi"]).pow(2).sum()

    found = hypergradient(
        inner,
        lambda p, m: p["w"].sum(),
        {"w": torch.zeros(2)},
        {"phi": torch.ones(2)},
        batches,
        optimizer=torchopt.sgd(lr=0.1),
        estimator=Implicit(),
    )
    torch.testing.assert_close(found.gradient["phi"], torch.ones(2))
    after = calls[len(batches) :]
    # One graph serves all products of a single batch; of several, each product takes one after the other.
    assert len(set(after)) == distinct
    assert after == after[:distinct] * (len(after) // distinct)
    assert (len(after) == 1) == (distinct == 1)


def test_one_graph_is_in_memory_at_a_time():
    x = torch.randn(50, 4, dtype=torch.float64)

    def most(steps):
        return most_kept(
            lambda: hypergradient(
                lambda p, m, t: ((x + t) @ p["w"]).cosh().log().mean() + (m["phi"] * p["w"] ** 2).sum(),
                lambda p, m: p["w"].sum(),
                {"w": torch.ones(4, dtype=torch.float64)},
                {"phi": torch.ones(4, dtype=torch.float64)},
                range(steps),
                optimizer=torchopt.sgd(lr=0.1),
                estimator=Implicit(),
            )
        )

    assert most(12) <= 1.02 * most(2)


@pytest.mark.slow
def test_through_a_balancer():
    """A linear student at the optimum of its weighted, penalised loss: both ways agree."""
    found = []
    for estimator in (Implicit(), Adjoint()):
        student, batch, meta_batch = meet("linear", size=60)
        balancer = BilevelLossBalancer(
            student,
            {"hard": terms.CrossEntropy(), "small": lambda z, batch: z.pow(2).sum(1)},
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            weighting=weighting.TermScalars(2).double(),
            estimator=estimator,
        )
        report = balancer.meta_step([batch] * 200, meta_batch)
        assert report.hypergradient_norm > 0
        found.append(torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def test_a_hessian_without_a_minimum_is_refused():
    def saddle(p, m, batch):
        return (p["w"][0] ** 2 - p["w"][1] ** 2) / 2 + (m["phi"] * p["w"]).sum()

    for solver, message in (("cg", "curvature"), ("neumann", "diverges")):
        with pytest.raises(MetaKDError, match=message):
            hypergradient(
                saddle,
                lambda p, m: p["w"].sum(),
                {"w": torch.zeros(2)},
                {"phi": torch.ones(2)},
                [None],
                optimizer=torchopt.sgd(lr=0.1),
                estimator=Implicit(solver, steps=50),
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "gmres"}, "'cg' and 'neumann'"),
        ({"steps": 0}, "steps is 0, but must be"),
        ({"damping": -1.0}, "damping must be"),
        ({"damping": float("nan")}, "damping must be"),
        ({"step_size": 0.1}, "have no step_size"),
        ({"solver": "neumann", "step_size": 0.0}, "step_size must be"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(MetaKDError, match=message):
        Implicit(**arguments)
