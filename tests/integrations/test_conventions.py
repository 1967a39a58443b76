"""What packages expect of a part of a loop, and what they do to the other parts."""

import copy

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError
from metakd.terms import CrossEntropy


def setting(**options):
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    return student, optimizer, BilevelLossBalancer(student, {"hard": CrossEntropy()}, optimizer=optimizer, **options)


def batch(dtype=torch.float32):
    return torch.randn(6, 4, dtype=dtype), torch.arange(6) % 3


def kept(balancer):
    """All tensors of the balancer that are to be where its weight model is."""
    state = balancer.state_dict()
    moments = [
        entry[key] for entry in state["weighting_optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq")
    ]
    assert moments and state["pending"]
    return [*state["weighting"].values(), *moments, *state["pending"].values()]


def test_to_takes_along_all_that_the_balancer_keeps():
    student, _, balancer = setting(accumulate=2)
    for _ in range(3):
        balancer(batch(), batch())
    before = kept(balancer)
    assert balancer.to(torch.float64) is balancer
    assert all(
        t.dtype == torch.float64 and torch.equal(t.float(), b) for t, b in zip(kept(balancer), before, strict=True)
    )
    student.double()
    balancer(batch(torch.float64), batch(torch.float64))
    assert balancer.report.weights.dtype == torch.float64
    assert not torch.equal(before[0].double(), next(balancer.weighting.parameters()))  # it has learned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_moves_to_another_device():
    student, _, balancer = setting(accumulate=2)
    for _ in range(3):
        balancer(batch(), batch())
    student.cuda()
    balancer.to("cuda")
    assert all(t.is_cuda for t in kept(balancer))
    balancer(*([t.cuda() for t in batch()] for _ in range(2)))
    assert balancer.report.weights.is_cuda


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's: no call of the base class, and all that counts is in `.optimizer`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


def test_a_wrapped_optimizer_is_mirrored():
    student, optimizer, balancer = setting(inner="mirror")
    balancer(batch(), batch()).backward()
    optimizer.step()
    wrapped = BilevelLossBalancer(
        student, balancer.terms, optimizer=Wrapped(Wrapped(optimizer)), inner="mirror",
        weighting=copy.deepcopy(balancer.weighting),
    )  # fmt: skip
    train, meta = batch(), batch()
    balancer(train, meta), wrapped(train, meta)
    assert torch.equal(balancer.report.influence, wrapped.report.influence)
    with pytest.raises(MetaKDError, match="cannot follow Rprop"):
        other = Wrapped(torch.optim.Rprop(student.parameters()))
        BilevelLossBalancer(student, balancer.terms, optimizer=other, inner="mirror")
