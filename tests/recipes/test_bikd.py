"""BiKD against its published iteration, written out."""

import copy

import pytest
import torch

from metakd import MetaKDError, recipes
from metakd.terms import CrossEntropy
from metakd.weighting import entropies
from tests.recipes.by_hand import close, hard, meta_batch, mlp, soft, step_ahead, student, teacher, train_batch


@pytest.mark.parametrize(("accumulate", "hidden"), [(1, (5,)), (2, (5, 4))])
def test_iterations_are_those_of_the_published_code(accumulate, hidden):
    model, guide = student(), teacher()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4)
    balancer = recipes.bikd(model, guide, optimizer=sgd, temperature=3.0, hidden=hidden, accumulate=accumulate, lr=1e-2)
    twin = copy.deepcopy(model)
    weights = [p.detach().clone().requires_grad_() for p in balancer.weighting.parameters()]
    adam = torch.optim.Adam(weights, lr=1e-2, weight_decay=1e-4)
    own_sgd = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4)

    for t in range(5):
        loss = balancer(train_batch(t), meta_batch(t))
        sgd.zero_grad()
        loss.backward()
        sgd.step()

        (x, y, _), (meta_x, meta_y) = train_batch(t), meta_batch(t)
        z = twin(x)
        losses = torch.stack([hard(z, y), soft(z, guide(x), 3.0)], dim=1)
        seen = torch.stack([hard(z, y), hard(guide(x), y)], dim=1).detach()
        inner = (mlp(weights, seen, torch.tanh) * losses).sum() / len(y)
        outer = hard(step_ahead(twin, inner, 0.3)(meta_x), meta_y).mean()
        gradient = torch.autograd.grad(outer, weights)
        for w, g, found in zip(weights, gradient, balancer.weighting.parameters(), strict=True):
            close(found.grad, g)
            w.grad = g / accumulate if w.grad is None else w.grad + g / accumulate
        if (t + 1) % accumulate == 0:
            adam.step()
            adam.zero_grad()
        z = twin(x)
        losses = torch.stack([hard(z, y), soft(z, guide(x), 3.0)], dim=1)
        own_loss = (mlp(weights, seen, torch.tanh).detach() * losses).sum() / len(y)
        own_sgd.zero_grad()
        own_loss.backward()
        own_sgd.step()

        close(loss, own_loss)
        close(balancer.report.meta_loss, outer.detach())
        for found, expected in zip(balancer.weighting.parameters(), weights, strict=True):
            close(found.detach(), expected.detach())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach())


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, 1),
        ({"classes": 10}, 1),
        ({"classes": 100}, 2),
        ({"classes": 1000}, 2),
        ({"classes": 100, "hidden": (64,)}, 1),
    ],
)
def test_the_hidden_layers_are_those_the_authors_recommend(options, layers):
    model = student()
    balancer = recipes.bikd(model, teacher(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)
    shapes = [tuple(p.shape) for p in balancer.weighting.parameters() if p.ndim == 2]
    assert shapes == [(64, 2), (64, 64), (2, 64)] if layers == 2 else [(64, 2), (2, 64)]
    assert balancer.accumulate == 5
    assert {key: balancer.weighting_optimizer.defaults[key] for key in ("lr", "weight_decay")} == {
        "lr": 1e-3,
        "weight_decay": 1e-4,
    }


def test_the_published_command_for_cifar10():
    model, guide = student(), teacher()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    balancer = recipes.bikd(model, guide, optimizer=sgd, setting="cifar10", classes=100, temperature=3.0)
    shapes = [tuple(p.shape) for p in balancer.weighting.parameters() if p.ndim == 2]
    assert balancer.accumulate == 1 and shapes == [(64, 2), (2, 64)]
    (x, y, _), (meta_x, meta_y) = train_batch(0), meta_batch(0)
    z = model(x)
    seen = torch.stack([hard(z, y), hard(guide(x), y)], dim=1).detach()
    losses = torch.stack([hard(z, y), soft(z, guide(x), 3.0)], dim=1)
    inner = (mlp(list(balancer.weighting.parameters()), seen, torch.tanh) * losses).sum() / len(y)
    ahead = step_ahead(model, inner, 0.3)(meta_x)
    balancer(train_batch(0), meta_batch(0))
    close(balancer.report.meta_loss, (hard(ahead, meta_y) + soft(ahead, guide(meta_x), 3.0)).mean().detach())
    own = recipes.bikd(model, guide, optimizer=sgd, setting="cifar10", accumulate=3, meta_loss=CrossEntropy())
    assert own.accumulate == 3 and own.meta_loss == CrossEntropy()
    with pytest.raises(MetaKDError, match="no setting 'mnist'; it follows None, 'cifar10'"):
        recipes.bikd(model, guide, optimizer=sgd, setting="mnist")


def test_the_teachers_outputs_may_come_with_the_batch():
    model, guide = student(), teacher()
    balancer = recipes.bikd(model, None, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    x, y, _ = train_batch(0)
    balancer({"inputs": x, "targets": y, "teacher": guide(x)}, meta_batch(0))
    close(balancer.report.losses[:, 1], soft(model(x), guide(x), 4.0).detach())
    seen = torch.stack([hard(model(x), y), hard(guide(x), y)], dim=1)
    close(balancer.report.weights, mlp(list(balancer.weighting.parameters()), seen, torch.tanh).detach())
    with pytest.raises(MetaKDError, match="teacher"):
        balancer((x, y), meta_batch(0))


def test_the_mlp_takes_the_features_it_is_given():
    def with_entropies(losses, outputs, batch):
        return torch.cat([losses, entropies(losses, outputs, batch)], dim=1)

    model = student()
    balancer = recipes.bikd(
        model, teacher(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), features=with_entropies, accumulate=1
    )
    balancer(train_batch(0), meta_batch(0)).backward()
    first = next(balancer.weighting.parameters())
    assert first.shape == (64, 4)
    before = first.detach().clone()
    balancer(train_batch(1), meta_batch(1))
    assert not torch.equal(before, first)  # its optimizer has the layer that the first batch made
