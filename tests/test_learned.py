"""What is read off a balancer is what the balancer says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, learned_weights, terms
from tests.test_no_trace import assert_same, trace_of


@pytest.fixture
def parts():
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(
        student, {"hard": terms.CrossEntropy(), "soft": terms.SoftTarget()}, optimizer=optimizer, teacher=teacher
    )
    inputs, targets = torch.randn(60, 1, 4, 4), torch.arange(60) % 3
    return balancer, student, teacher, [(inputs[i : i + 25], targets[i : i + 25]) for i in (0, 25, 50)]


def test_weights_and_features_of_every_sample_with_the_student_in_eval_mode(parts):
    balancer, student, teacher, batches = parts
    learned = learned_weights(balancer, batches)
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(learned.targets, targets) and learned.balancer is balancer
    student.eval()
    assert torch.allclose(learned.weights, balancer.weights((inputs, targets)), atol=1e-6)
    for k, network in enumerate((student, teacher)):
        expected = F.cross_entropy(network(inputs), targets, reduction="none")
        assert torch.allclose(learned.features[:, k], expected, atol=1e-5)


def test_it_leaves_no_trace_an_error_included(parts):
    balancer, student, teacher, batches = parts
    before = trace_of(student, balancer.optimizer, teacher, balancer.weighting)
    learned_weights(balancer, batches)
    with pytest.raises(MetaKDError, match="no batch to read weights of"):
        learned_weights(balancer, [])
    with pytest.raises(MetaKDError, match="must hold integer class indices"):
        learned_weights(balancer, [(batches[0][0], batches[0][1].view(-1, 1))])
    assert_same(trace_of(student, balancer.optimizer, teacher, balancer.weighting), before)


def test_the_mean_by_class(parts):
    learned = learned_weights(parts[0], parts[3])
    for c in range(3):
        assert torch.allclose(learned.by_class(4)[c], learned.weights[learned.targets == c].mean(0), atol=1e-6)
    assert learned.by_class(4)[3].isnan().all()


def test_weights_without_labels_are_refused():
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [lambda outputs, batch: outputs.square().mean(1)], optimizer=optimizer)
    with pytest.raises(MetaKDError, match="needs labels of shape"):
        learned_weights(balancer, [torch.randn(5, 4)])
