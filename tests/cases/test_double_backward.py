"""A backward that is right, and yet cannot be differentiated: reverse mode must not be taken for exact there."""

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

from metakd import MetaKDError, estimators, hypergradient
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH
from tests.cases.real_steps import Setup, balanced, data

pytestmark = pytest.mark.filterwarnings("ignore:.*has no forward-mode derivative", "ignore:forward mode is wrong")


class Recomputed(torch.autograd.Function):
    """tanh(x w), whose backward runs the forward again by itself."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).tanh()

    @staticmethod
    def backward(ctx, g):
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = (x @ w).tanh()
        return torch.autograd.grad(y, [x, w], g)


class LeavesTorch(Recomputed):
    @staticmethod
    def backward(ctx, g):
        x, w = (t.data for t in ctx.saved_tensors)
        inner = g.data * (1 - (x @ w).tanh() ** 2)
        return inner @ w.T, x.T @ inner


class SavesAnIntermediate(torch.autograd.Function):
    """The memory-efficient swish: right for one step, wrong in its second derivative."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(s * (1 + x * (1 - s)))
        return x * s

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w, self.function = nn.Parameter(0.5 * torch.randn(8, 8)), function

    def forward(self, x):
        return x + self.function(x, self.w)


def hooked(x, w):
    y = (x @ w).tanh()
    if y.requires_grad:
        y.register_hook(lambda g: g.detach() * 0.5)
    return y


FUNCTIONS = {"recomputed": Recomputed.apply, "leaves torch": LeavesTorch.apply, "hook": hooked}


def student(function):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(function), nn.Linear(8, CLASSES)).double()


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.OneStep("reverse"), estimators.Adjoint()])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_backward_that_cannot_be_differentiated_is_refused(function, estimator):
    balancer = balanced(Setup(student(FUNCTIONS[function]), HARD_AND_SMOOTH), estimator=estimator)
    for _ in range(2):
        with pytest.raises(MetaKDError, match=r"reverse mode is wrong on this model.*FiniteDifference"):
            balancer(*data())


@pytest.mark.parametrize("function", ["recomputed", "leaves torch"])
def test_differences_do_without(function):
    balancer = balanced(Setup(student(FUNCTIONS[function]), HARD_AND_SMOOTH), estimator=estimators.FiniteDifference())
    exact = balanced(Setup(student(lambda x, w: (x @ w).tanh()), HARD_AND_SMOOTH))
    for each in (balancer, exact):
        each(*data())
    torch.testing.assert_close(balancer.report.influence, exact.report.influence, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", [estimators.Adjoint(), estimators.Unroll()])
@pytest.mark.parametrize("function", [*FUNCTIONS, "saves"])
def test_several_steps_are_refused_likewise(function, estimator):
    known = FUNCTIONS | {"saves": lambda x, w: SavesAnIntermediate.apply(x @ w)}
    balancer = balanced(Setup(student(known[function]), HARD_AND_SMOOTH), estimator=estimator)
    batch, meta_batch = data()
    with pytest.raises(MetaKDError, match="reverse mode is wrong on this model"):
        balancer.meta_step([batch, batch], meta_batch)


def test_what_needs_no_second_derivative_of_it_is_taken():
    balancer = balanced(Setup(student(lambda x, w: SavesAnIntermediate.apply(x @ w)), HARD_AND_SMOOTH))
    right = balanced(Setup(student(lambda x, w: F.silu(x @ w)), HARD_AND_SMOOTH))
    for each in (balancer, right):
        each(*data())
    torch.testing.assert_close(balancer.report.influence, right.report.influence)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("estimator", [estimators.Adjoint(), estimators.Unroll()])
def test_hypergradient_sees_it_when_it_is_asked_to(estimator, steps):
    torch.manual_seed(0)
    x, y = torch.randn(6, 8).double(), torch.randn(6, 8).double()
    start, phi = {"w": 0.5 * torch.randn(8, 8).double()}, {"scale": torch.ones(8).double()}

    def run(function, **options):
        return hypergradient(
            lambda p, m, batch: F.mse_loss(function(x * m["scale"], p["w"]), y),
            lambda p, m: F.mse_loss(torch.tanh(x @ p["w"]), y),
            start,
            phi,
            range(steps),
            optimizer=torchopt.sgd(lr=0.5),
            estimator=estimator,
            **options,
        )

    run(lambda x, w: (x @ w).tanh(), verify=True)
    with pytest.raises(MetaKDError, match="reverse mode is wrong on this model"):
        run(Recomputed.apply, verify=True)
