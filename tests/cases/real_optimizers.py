"""The reference of the cases whose students are trained by torch's own optimizers, over one step or several."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import Batch, BilevelLossBalancer, estimators
from metakd._basics.module_call import call
from metakd.check.finite_differences import derivative
from metakd.terms import CrossEntropy
from metakd.weighting import TermScalars
from tests.cases.real_steps import data

SMOOTH = CrossEntropy(label_smoothing=0.3)
TERMS = {"hard": CrossEntropy(), "smooth": SMOOTH}
ESTIMATORS = [estimators.Adjoint(), estimators.Unroll()]
MODES = [estimators.OneStep("forward"), estimators.OneStep("reverse")]
Optimizer = torch.optim.Optimizer


class Case(NamedTuple):
    """A student as its user trains it."""

    student: nn.Module
    optimizers: Sequence[Optimizer]
    terms: dict[str, Any] = TERMS
    meta_loss: Any = CrossEntropy()


Build = Callable[[], Case]


def sgd(student: nn.Module, **options: Any) -> Case:
    return Case(student, [torch.optim.SGD(student.parameters(), lr=0.2)], **options)


def balanced(case: Case, **options: Any) -> BilevelLossBalancer:
    """A balancer whose weight model stands still; its gradient is the hypergradient."""
    weighting = TermScalars(len(case.terms), output="softplus").double()
    return BilevelLossBalancer(
        case.student,
        case.terms,
        optimizer=case.optimizers,
        weighting=weighting,
        weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
        meta_loss=case.meta_loss,
        **options,
    )


def plain(student: nn.Module, terms: Any, **options: Any) -> BilevelLossBalancer:
    """A balancer as its users build it, with the default weight model unless told otherwise."""
    return BilevelLossBalancer(student, terms, optimizer=torch.optim.SGD(student.parameters(), lr=0.2), **options)


def descent(optimizers: Sequence[Optimizer], lr: float | None = None) -> list[Optimizer]:
    """Plain gradient descent at the optimizers' present learning rates, or at one of its own."""
    groups = [
        {"params": g["params"], "lr": g.get("lr") if lr is None else lr} for o in optimizers for g in o.param_groups
    ]
    return [torch.optim.SGD(groups)]


Steppers = Callable[[Sequence[Optimizer]], Sequence[Optimizer]]


def real_meta_loss(
    build: Build, weights: Sequence[Tensor], batches: Sequence[Batch], meta_batch: Batch, steppers: Steppers
) -> Tensor:
    """The meta loss after one real step a batch on its weighted losses."""
    case = build()
    moving = steppers(case.optimizers)
    for w, batch in zip(weights, batches, strict=True):
        outputs = call(case.student, batch.inputs)
        losses = torch.stack([term(outputs, batch) for term in case.terms.values()], dim=1)
        case.student.zero_grad()
        ((w * losses).sum() / len(losses)).backward()
        for optimizer in moving:
            optimizer.step()
    return case.meta_loss(call(case.student, meta_batch.inputs), meta_batch).detach().mean()


def training_data(steps: int) -> tuple[list[Batch], Batch]:
    return [data(seed=seed)[0] for seed in range(steps)], data()[1]


def assert_right(
    build: Build,
    steps: int = 1,
    *,
    inner: Any = "sgd",
    estimator: Any = None,
    steppers: Steppers | None = None,
    given: tuple[list[Batch], Batch] | None = None,
    tolerance: float = 1e-6,
) -> BilevelLossBalancer:
    """A balancer's influence, or hypergradient through several steps, is the meta loss's slope after real steps."""
    batches, meta_batch = given or training_data(steps)
    moving = steppers or (descent if inner == "sgd" else tuple)
    estimator = estimator or (estimators.OneStep() if steps == 1 else estimators.Adjoint())
    balancer = balanced(build(), inner=inner, estimator=estimator)
    if steps == 1:
        balancer(batches[0], meta_batch)
        start, slope = balancer.report.weights, balancer.report.influence / len(balancer.report.weights)
    else:
        balancer.meta_step(batches, meta_batch)
        start, slope = balancer.weighting.free.detach().clone(), balancer.weighting.free.grad
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)

        def along(h: float, direction: Tensor = direction) -> float:
            moved = start + h * direction
            weights = [moved if steps == 1 else F.softplus(moved).expand(1, -1)] * steps
            return float(real_meta_loss(build, weights, batches, meta_batch, moving))

        expected, found = derivative(along, step=1e-2, rows=6), float((slope * direction).sum())
        assert abs(expected) > 1e-7
        assert abs(found - expected) <= tolerance * abs(expected), (found, expected)
    return balancer


def seeded(kind: Callable[[], nn.Module], dtype: torch.dtype | None = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return kind().to(dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
