"""The weight model that two processes share, and what sharing it takes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metakd import BilevelLossBalancer, check_hypergradient, estimators, terms, weighting
from tests.distributed.training import PART, balancer_of, batch, momentum, plain, run
from tests.test_no_trace import assert_same


def summed(rank, balancer, step):
    """How many numbers each all-reduce of a step takes the mean of."""
    sizes, real = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda t, **o: (t.is_floating_point() and sizes.append(len(t)), real(t, **o)))
        step(balancer)
    return sizes


def costs(rank):
    parts, meta = [batch(t, rank) for t in range(3)], batch(0, rank, 1)
    _, _, one = balancer_of(rank)
    _, _, ahead = balancer_of(rank, estimator=estimators.Adjoint())
    return (
        summed(rank, one, lambda balancer: balancer(parts[0], meta)),
        summed(rank, one, lambda balancer: balancer.loss(parts[0])),
        summed(rank, ahead, lambda balancer: balancer.meta_step(parts, meta)),
    )


def test_one_all_reduce_for_the_hypergradient_and_one_for_each_of_the_students_gradients(pair):
    student = 43 + 4  # parameters, and how many ranks have each of the four tensors
    for one, none, ahead in pair(costs):
        assert one == [student, student + 2, 17 + 4]
        assert none == []
        assert ahead == [student] * 3 + [student + 2] + [student] * 2 + [17 + 4]


class Running(weighting.LossMLP):
    """With a lazy layer, and a buffer that follows the features."""

    def __init__(self):
        super().__init__(None, 2, (3,))
        self.double().register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, features, batch):
        self.mean = 0.9 * self.mean + 0.1 * features.mean(0)
        return super().forward(features - self.mean, batch)


def model_of_one(rank):
    states = []
    for way in ("call", "loss", "meta_step"):
        _, _, balancer = balancer_of(rank, model=Running, estimator=estimators.Adjoint())
        assert any(nn.parameter.is_lazy(p) for p in balancer.weighting.parameters())
        run(rank, balancer, way)
        balancer(batch(3, rank), batch(3, rank, 1))
        states.append([p.detach() for p in balancer.weighting.parameters()])
        balancer.loss(batch(4, rank))  # begins with rank 0's buffers
        states.append(balancer.weighting.mean - 0.1 * balancer.report.losses.mean(0))
    return states


def test_the_weight_model_is_rank_zeros(pair):
    zero, one = pair(model_of_one)
    assert_same(zero[::2], one[::2])
    torch.testing.assert_close(zero[1::2], one[1::2], rtol=1e-9, atol=1e-12)


def overflowing(rank):
    """The first batch is beyond float16 on rank 1 alone."""
    torch.manual_seed(1)
    student = DistributedDataParallel(plain())
    torch.manual_seed(rank)
    balancer = BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=momentum(student.parameters()))
    skipped = []
    for step in range(3):
        (inputs, *labels), (meta, *meta_labels) = batch(step, rank), batch(step, rank, 1)
        inputs = 1e6 * inputs if rank == 1 and step == 0 else inputs
        with torch.autocast("cpu", torch.float16):
            loss = balancer((inputs.float(), *labels), (meta.float(), *meta_labels))
        loss.backward()
        skipped.append(balancer.report.skipped)
    return skipped, [p.detach() for p in balancer.weighting.parameters()]


def test_all_ranks_pass_over_what_overflows_on_one(pair):
    (zero, model), (one, other) = pair(overflowing)
    assert "float16 overflowed: a loss of another rank" in zero[0] and "'cross_entropy' is nan" in one[0].lower()
    assert zero[1:] == one[1:] == [None, None]
    assert_same(model, other)


def alone(rank):
    """What asks for no other rank."""
    student, _, balancer = balancer_of(rank, estimator=estimators.Adjoint())
    if rank == 0:
        before = copy.deepcopy(student.state_dict())
        assert balancer.weights(batch(0, rank)).shape == (PART, 2)
        assert check_hypergradient(balancer, [batch(0, rank), batch(1, rank)], batch(2, rank, 1)).verdict
        assert_same(student.state_dict(), before)


def test_weights_and_checks_need_one_rank(pair):
    pair(alone)
