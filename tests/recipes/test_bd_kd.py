"""BD-KD's gate in a balancer: the weighted sum of both divergences, written out."""

import torch

from metakd import BilevelLossBalancer, weighting
from metakd.terms import CrossEntropy, ReverseSoftTarget, SoftTarget
from tests.recipes.by_hand import close, hard, soft, student, teacher, train_batch


def entropy(z):
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return -(p * p.log()).sum(1)


def test_the_loss_is_the_gated_sum():
    model, guide = student(), teacher()
    with torch.no_grad():
        guide.weight.mul_(2.0)
        model.head.weight.mul_(3.0)
    balancer = BilevelLossBalancer(
        model,
        {"hard": CrossEntropy(), "soft": SoftTarget(2.0), "reverse": ReverseSoftTarget(2.0)},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        teacher=guide,
        weighting=weighting.EntropyGate(low=0.5, high=1.5),
        features=weighting.entropies,
    )
    x, y, _ = train_batch(0, size=30)
    z, z_teacher = model(x), guide(x)
    uncertain = entropy(z) > entropy(z_teacher)
    assert 0 < uncertain.sum() < 30
    nu, delta = torch.where(uncertain, 0.5, 1.5), torch.where(uncertain, 1.5, 0.5)
    expected = (hard(z, y) + nu * soft(z, z_teacher, 2.0) + delta * soft(z_teacher, z, 2.0)).mean()
    close(balancer.loss((x, y)), expected)
