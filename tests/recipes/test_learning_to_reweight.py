"""Learning to Reweight against the paper's algorithm, written out."""

import torch

from metakd import recipes
from metakd.terms import CrossEntropy
from tests.recipes.by_hand import close, hard, meta_batch, step_ahead, student, train_batch


def expected_weights(model, t, lr):
    (x, y, _), (meta_x, meta_y) = train_batch(t), meta_batch(t)
    eps = torch.zeros(len(y), dtype=torch.float64, requires_grad=True)
    outer = hard(step_ahead(model, (eps * hard(model(x), y)).sum(), lr)(meta_x), meta_y).mean()
    helpful = (-torch.autograd.grad(outer, eps)[0]).clamp(min=0)
    return helpful / helpful.sum() if helpful.sum() > 0 else helpful


def test_iterations_are_the_papers():
    model = student()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    balancer = recipes.learning_to_reweight(model, optimizer=sgd)
    dropped = 0
    for t in range(4):
        x, y, _ = train_batch(t)
        expected = expected_weights(model, t, 0.3)
        own_loss = (expected * hard(model(x), y)).sum()
        slopes = torch.autograd.grad(own_loss, list(model.parameters()))
        loss = balancer(train_batch(t), meta_batch(t))
        sgd.zero_grad()
        loss.backward()
        close(balancer.report.weights[:, 0] / len(y), expected)
        close(loss, own_loss)
        for p, slope in zip(model.parameters(), slopes, strict=True):
            close(p.grad, slope)
        sgd.step()
        dropped += int((expected == 0).sum())
    assert 0 < dropped < 4 * 6


def test_weights_of_several_terms_sum_to_one_together():
    model = student()
    terms = [CrossEntropy(), lambda outputs, batch: outputs.square().sum(1)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    balancer = recipes.learning_to_reweight(model, optimizer=sgd, terms=terms)
    balancer(train_batch(0), meta_batch(0))
    assert balancer.report.weights.shape == (6, 2)
    close(balancer.report.weights.sum() / 6, torch.tensor(1.0).double())
