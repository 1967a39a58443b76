"""What is read off a balancer is what the balancer says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import BilevelLossBalancer, terms
from metakd.longtail import Augment, Batches, learned_weights


@pytest.fixture
def parts():
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "soft": terms.SoftTarget()},
        optimizer=optimizer,
        teacher=teacher,
    )
    augment = Augment((0.0,), (1.0,), padding=1, flip=True, scale=1.0)
    train = Batches(torch.randn(600, 1, 4, 4), torch.arange(600) % 3, augment, 32)
    return balancer, student, teacher, train


def test_weights_and_losses_are_those_of_every_training_image_without_augmentation(parts):
    balancer, student, teacher, train = parts
    before = {name: value.clone() for name, value in student.state_dict().items()}
    learned = learned_weights(balancer, student, teacher, train)
    assert learned.terms == ("hard", "soft")
    assert torch.equal(learned.targets, train.targets)
    assert student.training
    for name, value in student.state_dict().items():
        assert torch.equal(before[name], value)
    student.eval()
    inputs, targets = train.images, train.targets
    assert torch.allclose(learned.weights, balancer.weights((inputs, targets)), atol=1e-6)
    for k, network in enumerate((student, teacher)):
        expected = F.cross_entropy(network(inputs), targets, reduction="none")
        assert torch.allclose(learned.losses[:, k], expected, atol=1e-5)


def test_the_mean_by_class(parts):
    learned = learned_weights(*parts)
    for c in range(3):
        assert torch.allclose(learned.by_class(3)[c], learned.weights[learned.targets == c].mean(0), atol=1e-6)
    assert learned.by_class(4)[3].tolist() == [0, 0]


def test_the_surface_is_the_weight_model_over_student_and_teacher_losses(parts):
    balancer, *_ = parts
    learned = learned_weights(*parts, grid=9)
    assert learned.axes.shape == (9, 2) and learned.surface.shape == (9, 9, 2)
    student, teacher = learned.axes[7, 0], learned.axes[2, 1]
    expected = balancer.weighting(torch.stack([student, teacher]).view(1, 2), None)
    assert torch.allclose(learned.surface[7, 2], expected[0], atol=1e-6)
    assert not torch.allclose(learned.surface[2, 7], learned.surface[7, 2])
    inside = learned.losses <= learned.axes[-1]
    assert inside.float().mean() > 0.95
