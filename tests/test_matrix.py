"""Zoo x estimator x inner optimizer: every cell agrees with `Unroll`, or raises the error that says why not.

`Unroll` itself is held to finite differences here and to double backwards written by hand in `test_zoo.py`.
"""

import warnings

import pytest
import torch
import torchopt

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll
from tests.zoo import QUIET, ZOO, meet

pytestmark = QUIET


def groups(params):
    params = list(params)
    return torch.optim.SGD([{"params": params[:1], "lr": 0.2}, {"params": params[1:]}], lr=0.05, momentum=0.8)


RULES = {
    "plain sgd": (lambda params: torch.optim.Adam(params, lr=0.1), "sgd"),
    "momentum": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2), "mirror"),
    "nesterov": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8, nesterov=True), "mirror"),
    "groups": (groups, "mirror"),
    "adam": (lambda params: torch.optim.Adam(params, lr=0.05, eps=1e-3), "mirror"),
    "adamw": (lambda params: torch.optim.AdamW(params, lr=0.05, eps=1e-3, weight_decay=0.1), "mirror"),
    "clip": (
        lambda params: torch.optim.SGD(params, lr=0.1),
        torchopt.chain(torchopt.clip_grad_norm(max_norm=0.3), torchopt.sgd(lr=0.3, momentum=0.9)),
    ),
}

# Estimator, number of inner steps, and how far from Unroll rounding (or the approximation) may take it.
CELLS = [
    (OneStep("forward"), 1, 1e-10),
    (OneStep("reverse"), 1, 1e-10),
    (IdentityJacobian(), 1, 1e-10),
    (Truncated(1), 1, 1e-10),
    (FiniteDifference(1e-4), 1, 1e-5),
    (Adjoint(), 3, 1e-10),
    (Adjoint("forward"), 3, 1e-10),
    (Adjoint("auto"), 3, 1e-10),
    (Truncated(3), 3, 1e-10),
    (FiniteDifference(1e-4), 3, 1e-5),
]


def hypergradient_of(name, rule, estimator, steps):
    student, batch, meta_batch = meet(name)
    build, inner = RULES[rule]
    torch.manual_seed(7)  # the weight model's start
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=build(p for p in student.parameters() if p.requires_grad),
        inner=inner,
        estimator=estimator,
    )
    torch.manual_seed(11)  # dropout
    balancer.meta_step([batch, meta_batch, batch][:steps], meta_batch)
    return torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()])


def lacks(name, estimator):
    """What the error says where an animal has no way through an estimator; None where there is one."""
    if estimator == OneStep("forward") and not ZOO[name].forward_mode:
        return "no forward-mode derivative"
    if estimator == Adjoint("forward") and not ZOO[name].forward_over_reverse:
        return "forward over reverse met an operation without a forward-mode derivative"
    return None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ZOO)
def test_every_cell_agrees_or_says_why_not(name, rule):
    exact = {steps: hypergradient_of(name, rule, Unroll(), steps) for steps in (1, 3)}
    for estimator, steps, tolerance in CELLS:
        if isinstance(estimator, FiniteDifference) and not ZOO[name].true_slope:
            continue  # it sees move what torch holds fixed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(no forward-mode derivative|forward over reverse fails)")
            message = lacks(name, estimator)
            if message is not None:
                with pytest.raises(MetaKDError, match=message):
                    hypergradient_of(name, rule, estimator, steps)
                continue
            error = (hypergradient_of(name, rule, estimator, steps) - exact[steps]).norm() / exact[steps].norm()
        assert error <= tolerance, f"{estimator} with K = {steps}: relative error {error:.1e}"


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].true_slope])
def test_unroll_agrees_with_finite_differences(name):
    student, batch, meta_batch = meet(name)
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.05, eps=1e-3),
        inner="mirror",
        estimator=Unroll(),
    )
    found = check_hypergradient(balancer, [batch, meta_batch], meta_batch, directions=1)
    assert max(found.relative_error.values()) < 1e-6


@pytest.mark.parametrize("name", ZOO)
def test_both_implicit_solvers_agree(name):
    """Far from an optimum, where the damping carries the system; see test_implicit.py for optima."""
    cg, neumann = (
        hypergradient_of(name, "plain sgd", Implicit(solver, steps=200, damping=30.0), 2)
        for solver in ("cg", "neumann")
    )
    assert (cg - neumann).norm() <= 1e-8 * cg.norm()


@pytest.mark.parametrize("estimator", [OneStep(), Adjoint(), Unroll(), Truncated(2), IdentityJacobian()], ids=str)
def test_an_operation_without_any_second_derivative_is_an_error(estimator):
    """torch.cdist has no forward-mode derivative, and its backward no derivative at all."""
    student, batch, meta_batch = meet("linear")
    centres = torch.randn(3, 3, dtype=torch.float64)
    student.register_forward_hook(lambda module, args, output: -torch.cdist(output, centres))
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        estimator=estimator,
    )
    with (
        pytest.raises(MetaKDError, match=r"_cdist_backward.* estimators\.FiniteDifference"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*no forward-mode derivative")
        balancer.meta_step([batch] * (1 if estimator == OneStep() else 3), meta_batch)


def test_estimators_are_all_here():
    tried = {type(estimator) for estimator, *_ in CELLS} | {Implicit, Unroll}
    others = {
        getattr(estimators, name) for name in ("Estimator", "Hypergradient", "Memory", "Problem", "WeightedLosses")
    }
    known = {value for name in estimators.__all__ if isinstance(value := getattr(estimators, name), type)}
    assert known - others == tried
