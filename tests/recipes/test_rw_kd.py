"""RW-KD against the rule that its reimplementations share, written out."""

import pytest
import torch

from metakd import recipes
from metakd.terms import CrossEntropy
from tests.recipes.by_hand import close, hard, meta_batch, soft, step_ahead, student, teacher, train_batch


@pytest.mark.parametrize("mixed", [True, False])
def test_iterations_are_those_of_the_reimplementations(mixed):
    model, guide = student(), teacher()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    options = {} if mixed else {"meta_loss": CrossEntropy()}
    balancer = recipes.rw_kd(model, guide, optimizer=sgd, temperature=2.0, **options)
    halves, seen = 0, []
    for t in range(6):
        (x, y, _), (meta_x, meta_y) = train_batch(t), meta_batch(t)
        eps = torch.zeros(len(y), 2, dtype=torch.float64, requires_grad=True)
        z = model(x)
        losses = torch.stack([hard(z, y), soft(z, guide(x), 2.0)], dim=1)
        meta_z = step_ahead(model, (eps * losses).sum(), 0.3)(meta_x)
        outer = (hard(meta_z, meta_y) + (soft(meta_z, guide(meta_x), 2.0) if mixed else 0.0)).mean()
        helpful = (-torch.autograd.grad(outer, eps)[0]).clamp(min=1e-12)
        expected = helpful / helpful.sum(dim=1, keepdim=True)

        loss = balancer(train_batch(t), meta_batch(t))
        torch.testing.assert_close(balancer.report.weights, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(loss, (expected * losses).sum() / len(y), rtol=1e-8, atol=1e-8)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        halves += int((expected == 0.5).all(dim=1).sum())
        seen.append(expected)
    shares = torch.cat(seen)[:, 1]
    assert halves > 0 and ((shares > 0.01) & (shares < 0.99) & (shares != 0.5)).any() and (shares < 1e-6).any()


def test_without_a_meta_batch_both_terms_count_one_half():
    model, guide = student(), teacher()
    balancer = recipes.rw_kd(model, guide, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    x, y, _ = train_batch(0)
    close(balancer.loss((x, y)), ((hard(model(x), y) + soft(model(x), guide(x), 4.0)) / 2).mean())
