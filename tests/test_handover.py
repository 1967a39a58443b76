"""A gradient handed on is, to everyone who looks, the gradient of the graph it came from."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from metakd._autodiff import graph_leaves
from metakd._call.known_gradient import hand_over


def test_leaves_are_all_that_ask_for_gradients_each_once():
    a, b, c, d, constant = (torch.ones(2, requires_grad=i < 4) for i in range(5))
    loss = ((a * b).exp() + a * constant + c.detach() + b.view(1, 2)).sum() + 0 * d.sum()
    assert {id(leaf) for leaf in graph_leaves(loss)} == {id(a), id(b), id(d)}
    assert len(graph_leaves(loss)) == 3


def test_leaves_of_constants_and_of_leaves():
    assert graph_leaves(torch.ones(())) == []
    assert graph_leaves(torch.ones((), requires_grad=True)) == []
    deep = leaf = torch.ones((), requires_grad=True)
    for _ in range(5000):  # deeper than Python's recursion limit
        deep = deep * 1.0
    assert [id(found) for found in graph_leaves(deep)] == [id(leaf)]


def loss_and_leaves(seed, layers):
    torch.manual_seed(seed)
    sizes = [3] * layers
    model = nn.Sequential(*(part for size in sizes for part in (nn.Linear(size, 3), nn.Tanh())))
    model.append(nn.Linear(3, 1)).double()
    loss = model(torch.randn(4, 3, dtype=torch.float64)).mean()
    return model, loss


@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.floats(-4, 4))
def test_backward_gives_what_the_graph_gives(seed, layers, scale):
    model, loss = loss_and_leaves(seed, layers)
    leaves = graph_leaves(loss)
    assert {id(leaf) for leaf in leaves} == {id(p) for p in model.parameters()}
    gradients = list(torch.autograd.grad(loss, leaves, retain_graph=True))
    (scale * loss).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    handed = hand_over(loss, leaves, gradients)
    assert torch.equal(handed, loss) and handed.requires_grad
    (scale * handed).backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-14, atol=1e-16)


def test_gradients_accumulate_and_the_handed_ones_stay_as_they_were():
    w, g = torch.ones(2, requires_grad=True), torch.tensor([2.0, 3.0])
    for times in (1, 2):
        hand_over(torch.tensor(1.0), [w], [g]).backward()
        assert torch.equal(w.grad, times * torch.tensor([2.0, 3.0]))
        assert torch.equal(g, torch.tensor([2.0, 3.0]))
    w.grad.zero_()
    assert torch.equal(g, torch.tensor([2.0, 3.0]))


def test_a_leaf_without_a_gradient_keeps_none():
    w, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    hand_over(torch.tensor(1.0), [w, unused], [torch.ones(2), None]).backward()
    assert unused.grad is None and w.grad is not None


def test_it_adds_to_other_losses():
    w = torch.ones(1, requires_grad=True)
    loss = hand_over(torch.tensor(3.0), [w], [torch.tensor([5.0])]) + (w * 7).sum()
    assert loss.item() == 10
    loss.backward()
    assert w.grad.item() == 12


def test_hooks_of_the_leaves_run():
    w, seen = torch.ones(1, requires_grad=True), []
    w.register_hook(lambda g: seen.append(g.item()))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.item()))
    hand_over(torch.tensor(3.0), [w], [torch.tensor([5.0])]).backward()
    assert seen == [5.0, 5.0]


def test_a_gradient_scaler_scales():
    w = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler.scale(hand_over(torch.tensor(3.0), [w], [torch.tensor([5.0])])).backward()
    assert w.grad.item() == 40
    scaler.step(optimizer)
    assert w.item() == pytest.approx(-4.0)


def test_its_value_cannot_be_differentiated_twice():
    w = torch.ones(1, requires_grad=True)
    loss = hand_over(torch.tensor(3.0), [w], [torch.tensor([5.0])])
    scale = torch.ones((), requires_grad=True)
    (g,) = torch.autograd.grad(loss * scale, w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
