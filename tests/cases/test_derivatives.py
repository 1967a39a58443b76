"""Students that take derivatives themselves, or change them: right, or noticed."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakd import MetaKDError, estimators
from metakd.terms import CrossEntropy
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH, body
from tests.cases.real_steps import LR, Setup, assert_right, balanced, data


class Forces(nn.Module):
    """Outputs gradients of an energy, as molecular potentials do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force[:, :CLASSES]


class Jacobians(nn.Module):
    """Calls functorch on a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(lambda row: self.body(row).sum()))(x)
        return self.head(self.body(x)) + slopes[:, :CLASSES]


class Ensemble(nn.Module):
    """Heads stacked and mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.heads = nn.Parameter(torch.randn(3, WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda head: self.body(x) @ head)(self.heads).mean(0)


class BehindAutograd(nn.Module):
    """Writes to a layer's output through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        z.data.add_(1.0)
        return self.head(torch.tanh(z))


@pytest.mark.parametrize("student", [Forces, Jacobians, Ensemble, BehindAutograd])
def test_inner_derivatives_and_writing_behind_autograd(student):
    balancer = assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))
    batch, meta_batch = data()
    loss = balancer(batch, meta_batch)
    loss.backward()
    found = [p.grad.clone() for p in balancer.student.parameters() if p.grad is not None]
    balancer.student.zero_grad()
    outputs = balancer.student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in HARD_AND_SMOOTH.values()], dim=1)
    (balancer.report.weights * losses).sum(1).mean().backward()
    expected = [p.grad for p in balancer.student.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected)


def penalty() -> Setup:
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()

    def slope(outputs: Tensor, batch) -> Tensor:
        with torch.enable_grad():
            x = batch.inputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(student(x).square().sum(), x, create_graph=True)
        return g.square().sum(1)

    return Setup(student, {"hard": CrossEntropy(), "penalty": slope})


def test_a_gradient_penalty_as_a_term():
    assert_right(penalty)


def by_double_backward(balancer, batch, meta_batch) -> Tensor:
    """The influence by a graph of the step: the gradients that autograd means, where hooks change them."""
    student = balancer.student
    params = dict(student.named_parameters())
    weights = balancer.report.weights.clone().requires_grad_()
    outputs = student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in balancer.terms.values()], dim=1)
    loss = (weights * losses).sum() / len(losses)
    steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - LR * g for (name, p), g in zip(params.items(), steps, strict=True)}
    meta = balancer.meta_loss(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
    return torch.autograd.grad(meta, weights)[0] * len(losses)


class Reversal(nn.Module):
    """Reverses the gradient of one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        if z.requires_grad:
            z.register_hook(lambda g: -0.5 * g)
        return self.head(z)


@torch.library.custom_op("metakd_cases::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


def _slope(ctx, g):
    (x,) = ctx.saved_tensors
    return 3 * x**2 * g


cube.register_autograd(_slope, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


class CustomOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + cube(self.body(x)))


@pytest.mark.parametrize(("student", "layer"), [(Reversal, "body.0"), (CustomOperation, "body.0")])
def test_wrong_tangents_are_found_and_reverse_mode_takes_over(student, layer):
    def build() -> Setup:
        torch.manual_seed(1)
        return Setup(student().double(), HARD_AND_SMOOTH)

    balancer, (batch, meta_batch) = balanced(build()), data()
    with pytest.warns(UserWarning, match=f"forward mode is wrong on this model.*{layer}.*reverse mode") as caught:
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)
    assert len(caught) == 1
    expected = by_double_backward(balancer, batch, meta_batch)
    torch.testing.assert_close(balancer.report.influence, expected)
    with pytest.raises(MetaKDError, match="forward mode is wrong on this model"):
        balanced(build(), estimator=estimators.OneStep("forward"))(batch, meta_batch)


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z + (z.sign() - z).detach())


def test_finite_differences_of_a_straight_through_estimator_are_noticed():
    student = StraightThrough().double()
    batch, meta_batch = data()
    exact = balanced(Setup(student, HARD_AND_SMOOTH))
    exact(batch, meta_batch)
    reverse = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimators.OneStep("reverse"))
    reverse(batch, meta_batch)
    torch.testing.assert_close(exact.report.influence, reverse.report.influence)
    differences = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimators.FiniteDifference())
    with pytest.warns(UserWarning, match="straight-through"):
        differences(batch, meta_batch)
