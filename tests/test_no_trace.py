"""A call leaves what one plain forward pass leaves, and nothing else, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metakd import BilevelLossBalancer, check_hypergradient, diagnose, estimators, learned_weights, terms
from metakd._basics.module_call import call
from tests.zoo import QUIET, ZOO, meet

pytestmark = QUIET

ESTIMATORS = [estimators.Adjoint(), estimators.OneStep(), estimators.OneStep("reverse"), estimators.Unroll()]


def trace_of(student, optimizer, *others):
    """Everything that a trace could be left on."""
    modules = [part for module in (student, *others) for part in module.modules()]
    return {
        "parameters": [p.detach().clone() for p in student.parameters()],
        "versions": [p._version for p in student.parameters()],
        "buffers": [b.clone() for module in (student, *others) for b in module.buffers()],
        "grads": [None if p.grad is None else p.grad.clone() for p in student.parameters()],
        "requires_grad": [p.requires_grad for p in student.parameters()],
        "identities": [id(p) for p in student.parameters()],
        "flags": [part.training for part in modules],
        "hooks": [
            (list(part._forward_hooks), list(part._forward_pre_hooks), list(part._backward_hooks)) for part in modules
        ],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [np.random.get_state()[1].copy()],
        "backends": [
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
        ],
    }


def assert_same(one, other, path="trace"):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape if one.is_meta else torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


def set_up(name, estimator=None, **options):
    student, batch, meta_batch = meet(name)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(3)
    loss = call(student, batch[0]).square().mean()
    loss.backward()  # a warm optimizer and left-over gradients
    optimizer.step()
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=optimizer,
        inner="mirror",
        estimator=estimator or estimators.OneStep(),
        **options,
    )
    return student, optimizer, balancer, batch, meta_batch


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_a_call_leaves_one_forward_pass(name, estimator):
    student, optimizer, balancer, batch, meta_batch = set_up(name, estimator)
    twin = copy.deepcopy(student)
    twin_optimizer = copy.deepcopy(optimizer)
    torch.manual_seed(5)
    outputs = call(twin, batch[0])
    expected = trace_of(twin, optimizer)
    torch.manual_seed(5)
    loss = balancer(batch, meta_batch)
    found = trace_of(student, optimizer)
    for key in ("identities", "versions", "grads"):
        expected.pop(key), found.pop(key)
    assert_same(found, expected)
    assert_same(optimizer.state_dict(), twin_optimizer.state_dict())
    weights = balancer.report.weights
    hard = terms.evaluate(balancer.terms, outputs, balancer._batch(batch, "it"))
    torch.testing.assert_close(loss, (weights * hard).sum() / len(weights), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")
@pytest.mark.parametrize("name", ZOO)
def test_everything_virtual_leaves_nothing(name):
    student, optimizer, balancer, batch, meta_batch = set_up(name, estimators.Unroll())
    before = trace_of(student, optimizer)
    balancer.weights(batch)
    balancer.meta_step([batch, batch], meta_batch)
    balancer.state_dict()
    assert_same(trace_of(student, optimizer), before)


def test_a_check_leaves_nothing_on_student_and_weight_model():
    student, optimizer, balancer, batch, meta_batch = set_up("batch_norm", estimators.Unroll())
    before, weights = trace_of(student, optimizer), balancer.state_dict()
    check_hypergradient(balancer, [batch, batch], meta_batch, directions=1)
    assert_same(trace_of(student, optimizer), before)
    assert_same(balancer.state_dict(), weights)


class Counting(nn.Module):
    """A weight model that counts the samples it has seen."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2).double()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features, batch):
        self.seen += len(features)
        return self.layer(features.double()).sigmoid()


def test_a_look_leaves_nothing_on_a_weight_model_with_buffers():
    _, _, balancer, batch, meta_batch = set_up("batch_norm", estimators.Unroll(), weighting=Counting())
    before = balancer.state_dict()
    balancer.weights(batch)
    learned_weights(balancer, [batch])
    check_hypergradient(balancer, [batch, batch], meta_batch, directions=1)
    diagnose(balancer, [batch, batch], [meta_batch], number=2)
    assert_same(balancer.state_dict(), before)
    balancer.loss(batch)  # which is no look
    assert balancer.weighting.seen > 0


def test_a_teacher_is_left_as_it_was():
    student, batch, meta_batch = meet("batch_norm")
    teacher, _, _ = meet("batch_norm", seed=1)
    teacher[1].eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(
        student, [terms.CrossEntropy(), terms.SoftTarget()], optimizer=optimizer, teacher=teacher
    )
    before = copy.deepcopy(teacher.state_dict())
    modes = [part.training for part in teacher.modules()]
    balancer(batch, meta_batch)
    assert_same(dict(teacher.state_dict()), dict(before))
    assert [part.training for part in teacher.modules()] == modes
    assert modes[0] and not modes[2]
    assert all(p.grad is None for p in teacher.parameters())


@given(
    st.sampled_from(["mlp", "dropout", "batch_norm", "unused_and_frozen"]),
    st.integers(1, 3),
    st.integers(1, 2),
)
@settings(max_examples=12)
def test_real_gradients_are_those_of_the_plain_loss(name, accumulate, every):
    """Handed on or computed again, `.grad` after backward is the gradient of the returned loss."""
    student, _, balancer, batch, meta_batch = set_up(name, accumulate=accumulate, every=every)
    for step in range(4):
        twin = copy.deepcopy(student)
        twin.zero_grad(), student.zero_grad()
        torch.manual_seed(step)
        (3.0 * balancer(batch, meta_batch)).backward()
        torch.manual_seed(step)
        losses = terms.evaluate(balancer.terms, twin(batch[0]), balancer._batch(batch, "it"))
        (3.0 * (balancer.report.weights * losses).sum() / len(losses)).backward()
        for p, q in zip(student.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_on_parameters_run_once_in_the_real_backward_alone(accumulate):
    student, _, balancer, batch, meta_batch = set_up("mlp", accumulate=accumulate)
    plain = copy.deepcopy(student)
    calls = []
    student[0].weight.register_hook(lambda g: calls.append(1) or 2 * g)
    student.zero_grad(), plain.zero_grad()
    loss = balancer(batch, meta_batch)
    assert not calls
    loss.backward()
    assert len(calls) == 1
    losses = terms.evaluate(balancer.terms, plain(batch[0]), balancer._batch(batch, "it"))
    ((balancer.report.weights * losses).sum() / len(losses)).backward()
    torch.testing.assert_close(student[0].weight.grad, 2 * plain[0].weight.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(student[2].weight.grad, plain[2].weight.grad, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:the optimizer. .* parameters are not the student's")
def test_trainable_parameters_inside_a_term_get_their_gradient():
    student, batch, meta_batch = meet("mlp")
    projector = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD([*student.parameters(), *projector.parameters()], lr=0.1)
    balancer = BilevelLossBalancer(
        student,
        {
            "hard": terms.CrossEntropy(),
            "projected": lambda outputs, batch: projector(outputs).square().sum(1),
        },
        optimizer=optimizer,
        accumulate=2,  # the first call hands its gradient on
    )
    balancer(batch, meta_batch).backward()
    handed = projector.weight.grad.clone()
    projector.zero_grad()
    weights = balancer.report.weights[:, 1]
    (weights * projector(student(batch[0])).square().sum(1)).mean().backward()
    torch.testing.assert_close(handed, projector.weight.grad, rtol=1e-12, atol=0)


def test_inputs_that_need_gradients_get_them():
    student, (x, y), meta_batch = meet("mlp")
    balancer = BilevelLossBalancer(
        student, [terms.CrossEntropy()], optimizer=torch.optim.SGD(student.parameters(), lr=0.1), accumulate=2
    )
    x = x.clone().requires_grad_()
    balancer((x, y), meta_batch).backward()
    assert x.grad.norm() > 0


def test_building_a_balancer_draws_no_random_numbers():
    student, *_ = meet("mlp")
    before = torch.get_rng_state()
    BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_of_old_graphs_is_not_kept():
    import gc
    import weakref

    _, _, balancer, batch, meta_batch = set_up("mlp", estimators.Unroll())
    loss = balancer(batch, meta_batch)
    graph = weakref.ref(loss)
    loss.backward()
    del loss
    gc.collect()
    assert graph() is None
    assert not any(t.requires_grad for t in vars(balancer.report).values() if isinstance(t, torch.Tensor))
