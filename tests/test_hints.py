"""Each way of being wrong gets its own hint, from `check_hypergradient` on a problem that is wrong in that way."""

import pytest
import torch
import torchopt

from metakd import MetaKDError, check_hypergradient
from metakd.estimators import FiniteDifference, IdentityJacobian, Implicit, Truncated
from tests.zoo import NoForwardMode

OWN = torch.Generator()  # draws that no one can repeat
X = torch.tensor([1.0, -0.4, 0.7], dtype=torch.float64)


class WrongBackward(NoForwardMode):
    """x^3 that claims the derivative 2 x."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def right(p, m, batch):
    return (m["phi"] * p["x"] ** 2).sum() / 2


def outer(p, m):
    return (p["x"] ** 2).sum()


WRONG = {
    "random": (
        lambda p, m, b: right(p, m, b) * (1 + 0.1 * torch.rand((), generator=OWN)),
        outer,
        "not a pure function: the same point",
    ),
    "domain": (right, lambda p, m: outer(p, m) + (m["phi"].sum() - 1.4999999999).log(), "NaN or infinite close by"),
    "float32": (lambda p, m, b: right(p, m, b), lambda p, m: outer(p, m).float() / 3, "float32 precision"),
    "zero": (
        lambda p, m, b: (m["phi"].detach() * p["x"] ** 2).sum() + (m["other"] * p["x"]).sum(),
        outer,
        r"phi: .*\n.*the estimate is zero",
    ),
    "kink": (
        right,
        lambda p, m: outer(p, m) + (m["phi"] - 0.5).relu().sum(),
        r"a kink: the slope is .* check at another point",
    ),
    "factor": (
        right,
        lambda p, m: outer(p, m).detach() + 3 * (outer(p, m) - outer(p, m).detach()),
        r"the estimate is 3 times the differences",
    ),
    "stop": (
        lambda p, m, b: right(p, m, b) * (1 + p["x"].detach().pow(2)[0] + m["phi"].detach()[1] ** 2),
        outer,
        "a stop-gradient",
    ),
    "backward": (right, lambda p, m: WrongBackward.apply(p["x"]).sum(), "backward is wrong"),
}


def check(inner, outer, **options):
    return check_hypergradient(
        inner,
        outer,
        {"x": X},
        {"phi": torch.full((3,), 0.5, dtype=torch.float64), "other": torch.ones(3, dtype=torch.float64)},
        [None] * 2,
        optimizer=torchopt.sgd(lr=0.3),
        **options,
    )


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")
@pytest.mark.parametrize("kind", WRONG)
def test_the_hint_names_the_cause(kind):
    inner, wrong_outer, message = WRONG[kind]
    with pytest.raises(MetaKDError, match=message):
        check(inner, wrong_outer)


@pytest.mark.parametrize(
    "estimator", [FiniteDifference(0.3), IdentityJacobian(), Truncated(1), Implicit(damping=1.0)], ids=str
)
def test_an_approximation_is_called_one(estimator):
    def cubic(p, m, batch):
        return right(p, m, batch) + (m["phi"] * p["x"] ** 3).sum() + 0.1 * (m["other"] * p["x"]).sum()

    with pytest.raises(MetaKDError, match=f"{type(estimator).__name__} is an approximation"):
        check(cubic, outer, estimator=estimator)


def test_the_verdict_of_a_right_one():
    found = check(right, outer)
    assert found.verdict.startswith("exact: the largest relative error is ")
    assert found._replace(relative_error={"phi": 1e-3, "other": 0.0}).verdict == (
        "wrong: the largest relative error is 1.0e-03 (phi), the tolerance 1e-06"
    )
    assert found._replace(relative_error={"phi": float("nan")}).verdict.startswith("wrong: ")
