"""The reference of the cases: real training steps, and central differences of what they lead to."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakd import Batch, BilevelLossBalancer
from metakd.check.finite_differences import derivative
from metakd.terms import CrossEntropy
from metakd.weighting import TermScalars

LR, SEED = 0.2, 5


class Setup(NamedTuple):
    """A student with its terms, built anew for each evaluation."""

    student: nn.Module
    terms: dict[str, Any]
    meta_loss: Any = CrossEntropy()


def data(size: int = 5, features: int = 4, seed: int = 0) -> tuple[Batch, Batch]:
    """A training batch and a meta batch with three classes, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        Batch(
            torch.randn(n, features, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in (size, size + 1)
    )  # type: ignore[return-value]


def balanced(setup: Setup, **options: Any) -> BilevelLossBalancer:
    """A balancer whose weight model stands still, so that its weights are those of the lookahead."""
    weighting = TermScalars(len(setup.terms), output="softplus").double()
    optimizer = torch.optim.SGD(setup.student.parameters(), lr=LR)
    return BilevelLossBalancer(
        setup.student,
        setup.terms,
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
        meta_loss=setup.meta_loss,
        **options,
    )


def meta_loss_after(build: Callable[[], Setup], weights: Tensor, batch: Batch, meta_batch: Batch) -> float:
    """One real SGD step on the weighted losses, then the meta loss; nothing of the library's virtual passes."""
    torch.manual_seed(1)
    student, terms, meta_loss = build()
    torch.manual_seed(SEED)
    batch, meta_batch = (Batch(b.inputs.clone(), b.targets) for b in (batch, meta_batch))
    outputs = student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in terms.values()], dim=1)
    ((weights * losses).sum() / losses.shape[0]).backward()
    with torch.no_grad():
        for p in student.parameters():
            if p.grad is not None:
                p.data.sub_(LR * p.grad.to_dense())
    return float(meta_loss(student(meta_batch.inputs), meta_batch).detach().mean())


def assert_right(build: Callable[[], Setup], tolerance: float = 1e-6, **options: Any) -> BilevelLossBalancer:
    """The balancer's influence is the slope of the meta loss after a real step; the balancer, after that call."""
    batch, meta_batch = data()
    torch.manual_seed(1)
    balancer = balanced(build(), **options)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forward mode may be found missing
        balancer(Batch(batch.inputs.clone(), batch.targets), Batch(meta_batch.inputs.clone(), meta_batch.targets))
    report = balancer.report
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        direction = torch.randn(report.weights.shape, generator=generator, dtype=torch.float64)

        def along(h: float, direction: Tensor = direction) -> float:
            return meta_loss_after(build, report.weights + h * direction, batch, meta_batch)

        expected = derivative(along, step=1e-2, rows=6)
        found = float((report.influence * direction).sum()) / report.losses.shape[0]
        assert abs(expected) > 1e-6
        assert abs(found - expected) <= tolerance * abs(expected), (found, expected)
    return balancer
