"""Meta-Weight-Net against its published iteration, written out."""

import copy

import pytest
import torch

from metakd import MetaKDError, recipes
from tests.recipes.by_hand import close, hard, meta_batch, mlp, step_ahead, student, train_batch


def normalised(weights):
    return weights / weights.sum()


def by_adam(weights):
    return torch.optim.Adam(weights, lr=1e-2, weight_decay=1e-4)


def by_sgd(weights):
    return torch.optim.SGD(weights, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=5e-4)


PUBLISHED = [("imbalance", normalised, by_sgd), ("noise", lambda weights: weights / len(weights), by_adam)]


@pytest.mark.parametrize(("setting", "scaled", "optimizer"), PUBLISHED, ids=["imbalance", "noise"])
def test_iterations_are_those_of_the_published_code(setting, scaled, optimizer):
    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    balancer = recipes.meta_weight_net(model, optimizer=sgd, setting=setting, hidden=8, lr=1e-2)
    weights = [p.detach().clone().requires_grad_() for p in balancer.weighting.parameters()]
    assert [tuple(w.shape) for w in weights] == [(8, 1), (8,), (1, 8), (1,)]
    own = optimizer(weights)
    for t in range(4):
        twin = copy.deepcopy(model)
        loss = balancer(train_batch(t), meta_batch(t))
        sgd.zero_grad()
        loss.backward()

        (x, y, _), (meta_x, meta_y) = train_batch(t), meta_batch(t)
        costs = hard(twin(x), y)[:, None]
        inner = (scaled(mlp(weights, costs.detach(), torch.relu)) * costs).sum()
        outer = hard(step_ahead(twin, inner, 0.3)(meta_x), meta_y).mean()
        own.zero_grad()
        outer.backward(inputs=weights)
        for found, expected in zip(balancer.weighting.parameters(), weights, strict=True):
            close(found.grad, expected.grad)
        own.step()
        costs = hard(twin(x), y)[:, None]
        new = scaled(mlp(weights, costs.detach(), torch.relu).detach())
        (new * costs).sum().backward()

        close(loss, (new * costs).sum())
        close(balancer.report.weights / len(y), new)
        for found, expected in zip(balancer.weighting.parameters(), weights, strict=True):
            close(found.detach(), expected.detach())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.grad, q.grad)
        sgd.step()


def test_the_settings_have_the_published_rates():
    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    rates = {
        name: recipes.meta_weight_net(model, optimizer=sgd, setting=name).weighting_optimizer
        for name in ("imbalance", "noise")
    }
    assert {name: (type(found).__name__, found.defaults["lr"]) for name, found in rates.items()} == {
        "imbalance": ("SGD", 1e-5),
        "noise": ("Adam", 1e-3),
    }
    with pytest.raises(MetaKDError, match="no setting 'noisy'; it follows 'imbalance', 'noise'"):
        recipes.meta_weight_net(model, optimizer=sgd, setting="noisy")


def test_a_teacher_given_for_another_purpose_changes_nothing_but_what_terms_see():
    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = recipes.meta_weight_net(model, optimizer=sgd, teacher=student().eval())
    balancer(train_batch(0), meta_batch(0))
    assert balancer.report.weights.mean().item() == pytest.approx(1.0)


def test_the_mlp_takes_the_features_it_is_given():
    def loss_and_label(losses, outputs, batch):
        return torch.cat([losses, batch.targets.unsqueeze(1).to(losses)], dim=1)

    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    balancer = recipes.meta_weight_net(model, optimizer=sgd, hidden=8, features=loss_and_label)
    balancer(train_batch(0), meta_batch(0)).backward()
    first = next(balancer.weighting.parameters())
    assert first.shape == (8, 2)
    before = first.detach().clone()
    balancer(train_batch(1), meta_batch(1))
    assert not torch.equal(before, first)
