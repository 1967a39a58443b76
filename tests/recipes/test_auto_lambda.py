"""Auto-lambda against the published virtual step, written out, with an exact gradient in place of differences."""

import pytest
import torch

from metakd import MetaKDError, recipes
from metakd.terms import CrossEntropy, SoftTarget
from tests.recipes.by_hand import close, hard, meta_batch, soft, step_ahead, student, teacher, train_batch

TASKS = {
    "left": lambda z, batch: (z[:, 0] - batch.targets) ** 2,
    "right": lambda z, batch: (z[:, 1] + batch.targets) ** 2,
    "noise": lambda z, batch: (z[:, 2] - 3.0).abs() + z[:, 0] ** 2,
}


def batch(t, size=6):
    x, y, _ = train_batch(t, size)
    return x, y.double()


def task_means(z, y):
    return torch.stack([((z[:, 0] - y) ** 2).mean(), ((z[:, 1] + y) ** 2).mean(),
                        ((z[:, 2] - 3.0).abs() + z[:, 0] ** 2).mean()])  # fmt: skip


@pytest.mark.parametrize(("primary", "chosen"), [("left", [0]), (["left", "right"], [0, 1])])
def test_iterations_are_those_of_the_published_code(primary, chosen):
    model, lr, momentum, decay = student(), 0.05, 0.9, 1e-2
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    balancer = recipes.auto_lambda(model, TASKS, optimizer=sgd, primary=primary, lr=0.02)
    weights = torch.full((3,), 0.1).double().requires_grad_()  # a parameter is born in float32
    adam = torch.optim.Adam([weights], lr=0.02)
    for t in range(8):
        (x, y), (meta_x, meta_y) = batch(t), batch(100 + t)
        params = dict(model.named_parameters())
        inner = (weights * task_means(model(x), y)).sum()
        slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        ahead = {}
        for (name, p), slope in zip(params.items(), slopes, strict=True):
            buffer = sgd.state[p]["momentum_buffer"] if sgd.state else torch.zeros_like(p)
            ahead[name] = p - lr * (momentum * buffer + slope + decay * p)
        outer = task_means(torch.func.functional_call(model, ahead, (meta_x,)), meta_y)[chosen].sum()
        adam.zero_grad()
        outer.backward(inputs=[weights])
        gradient = weights.grad.clone()
        adam.step()

        loss = balancer(batch(t), batch(100 + t))
        close(balancer.weighting.free.grad, gradient)
        close(balancer.weighting.free.detach(), weights.detach())
        close(loss, (weights.detach() * task_means(model(x), y)).sum())
        close(balancer.report.meta_loss, outer.detach())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert len({round(w, 3) for w in weights.tolist()}) == 3


@pytest.mark.parametrize("primary", ["middle", ["left", "middle"], []])
def test_a_primary_task_that_is_none_of_the_terms(primary):
    model = student()
    with pytest.raises(MetaKDError, match="must name one or more of the terms left, right, noise"):
        recipes.auto_lambda(model, TASKS, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), primary=primary)


def test_primary_tasks_that_need_the_teacher():
    model, guide = student(), teacher()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    tasks = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=4.0)}
    balancer = recipes.auto_lambda(model, tasks, optimizer=sgd, primary=["hard", "soft"], teacher=guide)
    balancer(train_batch(0), meta_batch(0))
    (x, y, _), (meta_x, meta_y) = train_batch(0), meta_batch(0)
    inner = 0.1 * (hard(model(x), y) + soft(model(x), guide(x), 4.0)).mean()
    z = step_ahead(model, inner, 0.1)(meta_x)
    close(balancer.report.meta_loss, (hard(z, meta_y) + soft(z, guide(meta_x), 4.0)).mean().detach())
