"""AMAL against its projected gradient step, written out."""

import pytest
import torch

from metakd import MetaKDError, recipes
from tests.recipes.by_hand import SAMPLES, close, hard, meta_batch, soft, step_ahead, student, teacher, train_batch


@pytest.mark.parametrize("last_layer", [None, ["head.*"]])
def test_iterations_are_projected_gradient_steps(last_layer):
    model, guide = student(), teacher()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    balancer = recipes.amal(
        model, guide, optimizer=sgd, samples=SAMPLES, temperature=2.0, lr=60.0, last_layer=last_layer
    )
    table = torch.full((SAMPLES, 2), 0.5, dtype=torch.float64)
    for t in range(4):
        (x, y, index), (meta_x, meta_y) = train_batch(t), meta_batch(t)
        rows = table[index].requires_grad_()
        z = model(x)
        losses = torch.stack([hard(z, y), soft(z, guide(x), 2.0)], dim=1)
        ahead = step_ahead(model, (rows * losses).sum() / len(y), 0.3, "head" if last_layer else "")
        (gradient,) = torch.autograd.grad(hard(ahead(meta_x), meta_y).mean(), rows)
        table[index] = (rows.detach() - 60.0 * gradient).clamp(0, 2)
        z = model(x)
        losses = torch.stack([hard(z, y), soft(z, guide(x), 2.0)], dim=1)
        own_loss = (table[index] * losses).sum() / len(y)

        loss = balancer(train_batch(t), meta_batch(t))
        close(balancer.weighting.free.grad[index], gradient)
        close(balancer.weighting.free.detach(), table)
        close(balancer.report.weights, table[index])
        close(loss, own_loss)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    at_an_end = (table == 0) | (table == 2)
    assert at_an_end.any() and (~at_an_end & (table != 0.5)).any() and (table == 0.5).any()


def test_misuse():
    model = student()
    parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "samples": SAMPLES}
    with pytest.raises(MetaKDError, match=r"last_layer is 'head\.\*'.*write \['fc\.\*'\]"):
        recipes.amal(model, teacher(), last_layer="head.*", **parts)
    with pytest.raises(MetaKDError, match="no trainable parameter is named 'classifier"):
        recipes.amal(model, teacher(), last_layer=["classifier.*"], **parts)(train_batch(0), meta_batch(0))
    with pytest.raises(MetaKDError, match=r"batch\.index, which is None"):
        recipes.amal(model, teacher(), **parts)(train_batch(0)[:2], meta_batch(0))
    with pytest.raises(MetaKDError, match="samples is 0"):
        recipes.amal(model, teacher(), **{**parts, "samples": 0})
