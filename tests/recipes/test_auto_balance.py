"""AutoBalance's learned loss, written out, with one step's exact hypergradient."""

import copy

import torch
import torch.nn.functional as F

from metakd import recipes
from tests.recipes.by_hand import close, hard, meta_batch, step_ahead, student, train_batch


def test_iterations_written_out():
    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    balancer = recipes.auto_balance(model, optimizer=sgd, classes=3, lr=0.05)
    dy, ly = (torch.full((3,), start).double().requires_grad_() for start in (1.0, 0.0))
    term = balancer.terms["scaled"]
    term.free_scale.data.copy_(dy.detach())  # born in float32, so not exactly 1
    adam = torch.optim.Adam([ly, dy], lr=0.05)
    for t in range(4):
        twin = copy.deepcopy(model)
        loss = balancer(train_batch(t), meta_batch(t))
        (x, y, _), (meta_x, meta_y) = train_batch(t), meta_batch(t)
        inner = F.cross_entropy(twin(x) * torch.sigmoid(dy) + ly, y)
        outer = hard(step_ahead(twin, inner, 0.3)(meta_x), meta_y).mean()
        adam.zero_grad()
        outer.backward(inputs=[ly, dy])
        close(term.offset.grad, ly.grad)
        close(term.free_scale.grad, dy.grad)
        adam.step()
        own = F.cross_entropy(twin(x) * torch.sigmoid(dy).detach() + ly.detach(), y)
        close(loss, own)
        assert (balancer.report.weights == 1).all()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    close(term.offset.detach(), ly.detach())
    assert ly.detach().abs().max() > 0.05 and not torch.equal(dy.detach(), torch.ones(3).double())
