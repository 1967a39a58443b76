"""Zoo x estimator x inner optimizer: every cell agrees with `Unroll`, or raises the error that says why not.

`Unroll` itself is held to finite differences, and one step to a double backward written by hand.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch.func import functional_call

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms
from metakd.estimators import Adjoint, FiniteDifference, IdentityJacobian, Implicit, OneStep, Truncated, Unroll
from tests.slow import slow_but
from tests.zoo import QUIET, ZOO, meet

pytestmark = QUIET
COMMON = (
    "dropout",
    "batch_norm",
    "tied_embedding",
    "lstm_dropout",
    "multihead_attention",
    "moving_centre",
    "unused_and_frozen",
)
TERMS = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}


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


def balanced(student, optimizer, inner, estimator):
    torch.manual_seed(7)  # the weight model's start
    return BilevelLossBalancer(student, TERMS, optimizer=optimizer, inner=inner, estimator=estimator)


def hypergradient_of(balancer):
    return torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()])


def found_by(name, rule, estimator, steps):
    """The hypergradient, and the influence where there is one: after one step."""
    student, batch, meta_batch = meet(name)
    build, inner = RULES[rule]
    balancer = balanced(student, build(p for p in student.parameters() if p.requires_grad), inner, estimator)
    torch.manual_seed(11)  # dropout
    if steps == 1:
        balancer(batch, meta_batch)
        return hypergradient_of(balancer), balancer.report.influence
    balancer.meta_step([batch, meta_batch, batch][:steps], meta_batch)
    return (hypergradient_of(balancer),)


def lacks(name, estimator):
    """What the error says where an animal has no way through an estimator; None where there is one."""
    if estimator == OneStep("forward") and not ZOO[name].forward_mode:
        return "no forward-mode derivative"
    if estimator == Adjoint("forward") and not ZOO[name].forward_over_reverse:
        return "forward over reverse met an operation without a forward-mode derivative"
    return None


@pytest.mark.parametrize("rule", slow_but(("momentum",), RULES))
@pytest.mark.parametrize("name", ZOO)
def test_every_cell_agrees_or_says_why_not(name, rule):
    exact = {steps: found_by(name, rule, Unroll(), steps) for steps in (1, 3)}
    for estimator, steps, tolerance in CELLS:
        if isinstance(estimator, FiniteDifference) and not ZOO[name].true_slope:
            continue  # it sees move what torch holds fixed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(no forward-mode derivative|forward over reverse fails)")
            message = lacks(name, estimator)
            if message is not None:
                with pytest.raises(MetaKDError, match=message):
                    found_by(name, rule, estimator, steps)
                continue
            found = found_by(name, rule, estimator, steps)
        for one, right in zip(found, exact[steps], strict=True):
            error = (one - right).norm() / right.norm()
            assert error <= tolerance, f"{estimator} with K = {steps}: relative error {error:.1e}"


@pytest.mark.parametrize("name", slow_but(COMMON, [name for name in ZOO if ZOO[name].true_slope]))
def test_unroll_agrees_with_finite_differences(name):
    student, batch, meta_batch = meet(name)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.05, eps=1e-3)
    balancer = balanced(student, optimizer, "mirror", Unroll())
    found = check_hypergradient(balancer, [batch, meta_batch], meta_batch, directions=1)
    assert max(found.relative_error.values()) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tied_embedding", "gru", "unused_and_frozen"])
def test_one_step_agrees_with_a_double_backward_written_by_hand(name):
    student, (x, y), (meta_x, meta_y) = meet(name)
    balancer = balanced(student, torch.optim.SGD(student.parameters(), lr=0.3), "sgd", OneStep())
    params = {n: p for n, p in student.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in student.named_buffers()}
    torch.backends.mkldnn.enabled = name != "gru"  # oneDNN's recurrent layers have no double backward
    try:
        outputs = functional_call(student, {**params, **buffers}, (x,))
        losses = torch.stack(
            [F.cross_entropy(outputs, y, reduction="none", label_smoothing=s) for s in (0.0, 0.3)], dim=1
        )
        weights = balancer.weighting(losses.detach(), Batch(x, y))
        inner = (weights * losses).sum() / len(y)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True, allow_unused=True)
        ahead = {n: p if g is None else p - 0.3 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        meta_loss = F.cross_entropy(functional_call(student, {**ahead, **buffers}, (meta_x,)), meta_y)
        expected = torch.autograd.grad(meta_loss, list(balancer.weighting.parameters()))
    finally:
        torch.backends.mkldnn.enabled = True
    expected = torch.cat([g.flatten() for g in expected])
    student, batch, meta_batch = meet(name)
    balancer.student.load_state_dict(student.state_dict())
    balancer(batch, meta_batch)
    torch.testing.assert_close(hypergradient_of(balancer), expected, rtol=1e-10, atol=1e-10 * expected.norm().item())
    torch.testing.assert_close(balancer.report.meta_loss, meta_loss.detach(), rtol=1e-12, atol=1e-12)


def test_one_step_falls_back_to_reverse_mode_with_one_warning():
    student, batch, meta_batch = meet("custom_function")
    balancer = balanced(student, torch.optim.SGD(student.parameters(), lr=0.3), "mirror", OneStep())
    with pytest.warns(UserWarning, match="no forward-mode derivative") as caught:
        balancer(batch, meta_batch)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer(batch, meta_batch)


@pytest.mark.parametrize("name", slow_but(COMMON[:2], ZOO))
def test_both_implicit_solvers_agree(name):
    """Far from an optimum, where the damping carries the system; see test_implicit.py for optima."""
    (cg,), (neumann,) = (
        found_by(name, "plain sgd", Implicit(solver, steps=200, damping=30.0), 2) for solver in ("cg", "neumann")
    )
    assert (cg - neumann).norm() <= 1e-8 * cg.norm()


@pytest.mark.parametrize("estimator", [OneStep(), Adjoint(), Unroll(), Truncated(2), IdentityJacobian()], ids=str)
def test_an_operation_without_any_second_derivative_is_an_error(estimator):
    student, batch, meta_batch = meet("linear")
    margins = partial(F.multi_margin_loss, reduction="none")  # no forward mode, and no derivative of its backward
    student.register_forward_hook(lambda module, args, z: z + margins(z, torch.arange(len(z)) % 3)[:, None])
    balancer = balanced(student, torch.optim.SGD(student.parameters(), lr=0.1), "sgd", estimator)
    with (
        pytest.raises(MetaKDError, match=r"multi_margin_loss_backward.* estimators\.FiniteDifference"),
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
