"""Every awkward module: all exact ways to the hypergradient agree, with each other and with finite differences."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms
from tests.zoo import QUIET, ZOO, meet

pytestmark = QUIET

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9, weight_decay=1e-2),
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
}


def balanced(student, optimizer, estimator, inner="mirror"):
    torch.manual_seed(7)  # the weight model's start
    return BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=optimizer,
        inner=inner,
        estimator=estimator,
    )


def hypergradient_of(balancer, batch, meta_batch):
    torch.manual_seed(11)  # dropout
    loss = balancer(batch, meta_batch)
    gradient = torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()])
    return gradient, loss, balancer.report.influence


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("name", ZOO)
def test_one_step_forward_reverse_and_unroll_agree(name, rule):
    results = {}
    for estimator in (
        estimators.OneStep("forward"),
        estimators.OneStep("reverse"),
        estimators.Unroll(),
    ):
        student, batch, meta_batch = meet(name)
        balancer = balanced(student, OPTIMIZERS[rule](student.parameters()), estimator)
        if estimator == estimators.OneStep("forward") and not ZOO[name].forward_mode:
            with pytest.raises(MetaKDError, match="no forward-mode derivative"):
                balancer(batch, meta_batch)
            continue
        results[str(estimator)] = hypergradient_of(balancer, batch, meta_batch)
    assert len(results) >= 2
    gradient, loss, influence = results[str(estimators.Unroll())]
    assert gradient.norm() > 0
    for other_gradient, other_loss, other_influence in results.values():
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=1e-10 * gradient.norm().item())
        scale = influence.norm().item()
        torch.testing.assert_close(other_influence, influence, rtol=1e-10, atol=1e-10 * scale)
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].true_slope])
def test_one_step_agrees_with_finite_differences(name):
    student, batch, meta_batch = meet(name)
    mode = "forward" if ZOO[name].forward_mode else "reverse"
    balancer = balanced(student, OPTIMIZERS["momentum"](student.parameters()), estimators.OneStep(mode))
    found = check_hypergradient(balancer, [batch], meta_batch, directions=1)
    assert max(found.relative_error.values()) < 1e-6


@pytest.mark.parametrize("name", ["inplace_relu", "batch_norm", "lstm_dropout", "multihead_attention", "moving_centre"])
def test_three_steps_agree_with_finite_differences(name):
    student, batch, meta_batch = meet(name)
    balancer = balanced(student, OPTIMIZERS["adam"](student.parameters()), estimators.Unroll())
    found = check_hypergradient(balancer, [batch, meta_batch, batch], meta_batch, directions=1)
    assert max(found.relative_error.values()) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tied_embedding", "gru", "unused_and_frozen"])
def test_agrees_with_double_backward_written_by_hand(name):
    student, (x, y), (meta_x, meta_y) = meet(name)
    balancer = balanced(student, torch.optim.SGD(student.parameters(), lr=0.3), estimators.OneStep(), inner="sgd")
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
    gradient, _, _ = hypergradient_of(balancer, batch, meta_batch)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10 * expected.norm().item())
    torch.testing.assert_close(balancer.report.meta_loss, meta_loss.detach(), rtol=1e-12, atol=1e-12)


def test_auto_falls_back_with_one_warning():
    student, batch, meta_batch = meet("custom_function")
    balancer = balanced(student, OPTIMIZERS["sgd"](student.parameters()), estimators.OneStep())
    with pytest.warns(UserWarning, match="no forward-mode derivative") as caught:
        balancer(batch, meta_batch)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer(batch, meta_batch)
