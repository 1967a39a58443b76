"""Inner losses of every operation, the meta-parameters before it: exact, or refused by name.

`tests/proof` composes operations at random.
"""

from dataclasses import dataclass

import pytest
import torch
import torchopt

from metakd import MetaKDError, hypergradient
from metakd.estimators import Adjoint, IdentityJacobian, OneStep, Truncated, Unroll
from tests.estimators.operations import DOUBLE, LOSSES, ONCE, OPERATIONS, Y, draw

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's beta parts

X = draw(8, 4)


@dataclass(frozen=True)
class Composed:
    """A layer, then an operation, then a loss; the meta-parameters before all of it, plain SGD steps."""

    operation: str = "sin"
    loss: str = "sine"
    steps: int = 1
    lr: float = 0.02

    @property
    def once(self):
        return not ONCE.isdisjoint((self.operation, self.loss))

    def inner(self, p, m, batch):
        h = 0.5 * torch.tanh(X * m["g"] @ p["w"] / 2 + Y / 8)
        z = OPERATIONS[self.operation](h).flatten()
        z = z[torch.arange(32) % len(z)].view(8, 4)
        return LOSSES[self.loss](torch.tanh(z))

    def outer(self, p, m):
        return (X @ p["w"] - Y).square().mean()

    @property
    def params(self):
        return {"w": torch.eye(4, dtype=DOUBLE) + 0.3 * draw(4, 4, seed=7)}

    @property
    def meta_params(self):
        return {"g": 1 + 0.3 * draw(4, seed=8)}

    def trained(self, g):
        """The outer loss after the steps, by first-order gradients."""
        torch.manual_seed(0)
        w = self.params["w"]
        for t in range(self.steps):
            w = w.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.inner({"w": w}, {"g": g}, t), [w])
            w = w - self.lr * slope
        return self.outer({"w": w}, None).item()

    def differences(self, h=3e-4):
        at = self.meta_params["g"]
        units = torch.eye(4, dtype=DOUBLE) * h
        ahead = [[self.trained(at + k * unit) - self.trained(at - k * unit) for k in (1, 2)] for unit in units]
        return torch.tensor([(8 * one - two) / (12 * h) for one, two in ahead], dtype=DOUBLE)

    def by(self, estimator):
        torch.manual_seed(0)
        arguments = self.inner, self.outer, self.params, self.meta_params, range(self.steps)
        return hypergradient(*arguments, optimizer=torchopt.sgd(lr=self.lr), estimator=estimator).gradient["g"]


ONE = [OneStep(), OneStep("forward"), Truncated(1), IdentityJacobian()]
SEVERAL = [Adjoint(), Adjoint("forward"), Unroll()]


def refuses_by_right(composed, estimator, error):
    """Whether this estimator may refuse: forward mode always, the others what torch has no second derivative of.

    At some points that is so with operations that have one elsewhere: the root of a variance of zero, `logcumsumexp`
    where a gradient is zero, `index_reduce` of several zeros.
    """
    here = "NaN or infinite entries" in str(error) or "Double backward is unsupported" in str(error)
    return "forward" in str(estimator) or composed.once or here


def assert_exact_or_refused(composed, estimator, expected):
    try:
        found = composed.by(estimator)
    except MetaKDError as error:
        assert refuses_by_right(composed, estimator, error), error
        return
    assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-11, estimator


STEPS = pytest.mark.parametrize(("steps", "estimators"), [(1, ONE), pytest.param(2, SEVERAL, marks=pytest.mark.slow)])


@STEPS
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_with_the_meta_parameters_before_it(name, steps, estimators):
    composed = Composed(name, steps=steps)
    expected = composed.differences()
    assert expected.any(), "nothing is tested"
    for estimator in estimators:
        assert_exact_or_refused(composed, estimator, expected)


@STEPS
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_with_the_meta_parameters_before_it(name, steps, estimators):
    composed = Composed(loss=name, steps=steps)
    expected = composed.differences()
    for estimator in estimators:
        assert_exact_or_refused(composed, estimator, expected)


@pytest.mark.parametrize("name", sorted(ONCE))
def test_what_torch_cannot_differentiate_twice_is_refused(name):
    composed = Composed(loss=name) if name in LOSSES else Composed(name)
    for estimator in ONE:
        with pytest.raises(MetaKDError, match=r"second derivative|once_differentiable"):
            composed.by(estimator)
