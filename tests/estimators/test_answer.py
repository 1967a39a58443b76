"""A hypergradient that is zero is an answer; one that nothing leads to is an error that names the missing link."""

import pytest
import torch
import torchopt

from metakd import MetaKDError, hypergradient
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll

ESTIMATORS = [
    Adjoint(),
    Adjoint("forward"),
    Unroll(),
    OneStep(),
    OneStep("forward"),
    OneStep("reverse"),
    Truncated(1),
    IdentityJacobian(),
    FiniteDifference(),
    FiniteDifference(sides=1),
    Implicit(damping=1.0),
]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def line(estimator, **changes):
    """theta' = x - 0.2 phi x, with parts of it replaced."""
    arguments = {
        "inner": lambda p, m, batch: (m["phi"] * p["x"] ** 2).sum(),
        "outer": lambda p, m: p["x"].sum(),
        "params": {"x": torch.tensor([1.0, 2.0]), "other": torch.ones(2)},
        "meta_params": {"phi": torch.tensor([0.5, 0.5])},
        "batches": [None],
        "optimizer": torchopt.sgd(lr=0.1),
        **changes,
    }
    return hypergradient(**arguments, estimator=estimator)


ZEROS = {
    "decay at the origin": {"params": {"x": torch.zeros(2)}},
    "no learning rate": {"optimizer": torchopt.sgd(lr=0.0)},
    "a flat outer loss": {"outer": lambda p, m: 0 * p["x"].sum()},
    "an outer optimum": {"outer": lambda p, m: (p["x"] - torch.tensor([0.9, 1.8])).pow(2).sum()},
    "a learning rate at rest": {
        "inner": lambda p, m, batch: (p["x"] - torch.tensor([1.0, 2.0])).pow(2).sum(),
        "optimizer": lambda m: torchopt.sgd(lr=m["phi"].sum()),
    },
    "a dead unit": {"inner": lambda p, m, batch: (m["phi"] * p["x"].clamp(max=0) ** 2).sum()},
}


@each_estimator
@pytest.mark.parametrize("changes", ZEROS.values(), ids=ZEROS)
def test_zero_is_an_answer(estimator, changes):
    if isinstance(estimator, Implicit) and "optimizer" in changes:
        return  # it asks where the steps lead to, not how far they go
    error = 1e-2 if estimator == FiniteDifference(sides=1) else 1e-6
    torch.testing.assert_close(line(estimator, **changes).gradient["phi"], torch.zeros(2), rtol=0, atol=error)


CUTS = {
    "outer ignores all": ({"outer": lambda p, m: torch.tensor(1.0)}, "outer loss depends neither on the parameters"),
    "outer is cut": ({"outer": lambda p, m: p["x"].detach().sum()}, "outer loss depends neither on the parameters"),
    "inner is cut": (
        {"inner": lambda p, m, batch: (m["phi"] * p["x"].detach() ** 2).sum()},
        r"inner loss does not depend on the parameters \['x', 'other'\]",
    ),
    "different parts": (
        {"outer": lambda p, m: p["other"].sum()},
        r"outer loss depends only on \['other'\], and the inner steps move only \['x'\]",
    ),
    "phi is cut": (
        {"inner": lambda p, m, batch: (m["phi"].detach() * p["x"] ** 2).sum()},
        "they do not depend on the meta-parameters",
    ),
    "phi is cut from the rate": (
        {"inner": lambda p, m, b: (p["x"] ** 2).sum(), "optimizer": lambda m: torchopt.sgd(lr=m["phi"].sum().item())},
        "they do not depend on the meta-parameters",
    ),
    "phi stands alone": (
        {"inner": lambda p, m, batch: (p["x"] ** 2).sum() + m["phi"].sum()},
        "they do not depend on the meta-parameters",
    ),
}


@each_estimator
@pytest.mark.parametrize(("changes", "message"), CUTS.values(), ids=CUTS)
def test_a_missing_link_is_named(estimator, changes, message):
    with pytest.raises(
        MetaKDError, match=rf"the hypergradient is (None|zero) for all meta-parameters \['phi'\]: .*{message}"
    ):
        line(estimator, **changes)


@each_estimator
def test_a_meta_parameter_that_is_felt_is_enough(estimator):
    meta = {"phi": torch.tensor([0.5, 0.5]), "spare": torch.ones(3)}
    found = line(estimator, meta_params=meta).gradient
    assert found["phi"].any() and torch.equal(found["spare"], torch.zeros(3))
