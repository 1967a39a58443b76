"""The order of the two steps: the weight model before the student, or beside it."""

import pytest
import torch
from torch import nn

from benchmarks.common.counts import count as counted
from metakd import BilevelLossBalancer, MetaKDError, weighting
from metakd.terms import CrossEntropy, SoftTarget

LR, META_LR = 0.1, 0.5


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


def parts():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    teacher, model = nn.Linear(4, 3).double(), weighting.LossMLP(2, 2).double()
    return student, teacher, model


def balancer_of(student, teacher, model, **options):
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    terms = {"hard": CrossEntropy(), "soft": SoftTarget()}
    meta_optimizer = torch.optim.SGD(model.parameters(), lr=META_LR)
    options = {"weighting": model, "weighting_optimizer": meta_optimizer, "teacher": teacher, **options}
    return BilevelLossBalancer(student, terms, optimizer=optimizer, **options), optimizer


def by_hand(student, teacher, model, batch, meta):
    """One step of both models from the same start, by autograd."""
    (x, y), (meta_x, meta_y) = batch, meta
    with torch.no_grad():
        taught = teacher(x)
    losses = torch.stack([
        nn.functional.cross_entropy(student(x), y, reduction="none"),
        16 * nn.functional.kl_div((student(x) / 4).log_softmax(1), (taught / 4).softmax(1), reduction="none").sum(1),
    ], 1)  # fmt: skip
    features = torch.stack([losses[:, 0].detach(), nn.functional.cross_entropy(taught, y, reduction="none")], 1)
    params = dict(student.named_parameters())
    loss = (model(features, None) * losses).sum() / len(x)
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - LR * g for (name, p), g in zip(params.items(), found, strict=True)}
    meta_loss = nn.functional.cross_entropy(torch.func.functional_call(student, ahead, (meta_x,)), meta_y)
    moves = torch.autograd.grad(meta_loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(params.values(), found, strict=True):
            p -= LR * g
        for p, g in zip(model.parameters(), moves, strict=True):
            p -= META_LR * g


def test_simultaneous_steps_are_those_by_hand():
    (student, teacher, model), (own, _, own_model) = parts(), parts()
    balancer, optimizer = balancer_of(student, teacher, model, order="simultaneous")
    for seed in range(4):
        loss = balancer(data(seed), data(seed + 10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand(own, teacher, own_model, data(seed), data(seed + 10))
        pairs = zip(
            (*student.parameters(), *model.parameters()), (*own.parameters(), *own_model.parameters()), strict=True
        )
        for mine, wanted in pairs:
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


def test_the_two_orders_differ_in_the_weights_of_the_loss_alone():
    reports = {}
    for order in ("sequential", "simultaneous"):
        student, teacher, model = parts()
        balancer, _ = balancer_of(student, teacher, model, order=order)
        before = balancer.weights(data(0))
        balancer(data(0), data(1))
        reports[order] = balancer.report, before, balancer.weights(data(0))
    (one, before, after), (other, _, _) = reports["sequential"], reports["simultaneous"]
    torch.testing.assert_close(one.influence, other.influence)
    torch.testing.assert_close(other.weights, before)
    torch.testing.assert_close(one.weights, after)
    assert not torch.allclose(before, after)


def test_simultaneous_steps_save_a_backward_pass():
    kernels = {}
    for order in ("sequential", "simultaneous"):
        student, teacher, model = parts()
        balancer, optimizer = balancer_of(student, teacher, model, order=order)

        def iteration(balancer=balancer, optimizer=optimizer):
            loss = balancer(data(0), data(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        iteration()
        kernels[order] = counted(iteration).kernels["mm"]
    assert kernels["sequential"] - kernels["simultaneous"] >= 3  # two layers' weights and the inputs between them


def test_a_weight_model_that_looks_ahead_with_zeros_is_refused():
    student, teacher, _ = parts()
    model = weighting.Rectified(2)
    with pytest.raises(MetaKDError, match="never move the student"):
        BilevelLossBalancer(
            student,
            [CrossEntropy(), SoftTarget()],
            optimizer=torch.optim.SGD(student.parameters(), lr=LR),
            teacher=teacher,
            weighting=model,
            order="simultaneous",
        )
    with pytest.raises(MetaKDError, match="'sequential' or 'simultaneous', got 'jacobi'"):
        balancer_of(*parts(), order="jacobi")
