"""Where one of two processes fails, none waits."""

import copy
import os

import pytest
import torch
from torch import nn

from metakd import MetaKDError, estimators, terms, weighting
from metakd.batch import as_batch
from tests.distributed.pair import Pair
from tests.distributed.training import balancer_of, batch, run
from tests.test_no_trace import assert_same


class Trap:
    """Raises on rank 1, at a place, on the n-th visit from when it was set."""

    __module__ = "torch"  # what users' objects keep is put back after virtual passes

    def __init__(self, rank):
        self.rank, self.place, self.left = rank, None, 0

    def set(self, place, visit=1):
        self.place, self.left = (place, visit) if self.rank == 1 else (None, 0)

    def at(self, place, value):
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                raise ZeroDivisionError(f"in the {place}")
        return value


class TrappedModel(nn.Module):
    def __init__(self, trap):
        super().__init__()
        self.inner, self.trap = weighting.LossMLP(2, 2, (3,)).double(), trap

    def forward(self, features, batch):
        return self.trap.at("weight model", self.inner(features, batch))


def trapped(rank):
    """A balancer with a trap at each of the places where its parts are called."""
    trap, cross_entropy = Trap(rank), terms.CrossEntropy()
    torch.manual_seed(rank)
    model = TrappedModel(trap)
    moves = torch.optim.Adam(model.parameters(), lr=0.01)
    moves.register_step_pre_hook(lambda *_: trap.at("optimizer", None))
    student, optimizer, balancer = balancer_of(
        rank,
        model=lambda: model,
        weighting_optimizer=moves,
        meta_loss=lambda outputs, batch: trap.at("meta loss", cross_entropy(outputs, batch)),
        features=lambda losses, outputs, batch: trap.at("features", losses),
        batch_fn=lambda item: trap.at("batch", as_batch(item)),
        estimator=estimators.Adjoint(),
    )
    balancer.terms["hard"] = lambda outputs, batch: trap.at("term", cross_entropy(outputs, batch))
    student.module[1].register_forward_hook(lambda *_: trap.at("student", None))
    return student, optimizer, balancer, trap


def go_on(rank, student, optimizer, balancer):
    for step in range(2):
        optimizer.zero_grad()
        balancer(batch(step, rank), batch(step, rank, 1)).backward()
        optimizer.step()
    return [p.detach() for p in (*student.parameters(), *balancer.weighting.parameters())]


STEP = "call", "meta_step", "loss", "windows"
FAULTS = [
    *((place, 1, way) for place in ("batch", "student", "term", "features", "weight model") for way in STEP),
    *((place, visit, way) for place, visit in (("meta loss", 1), ("optimizer", 1)) for way in ("call", "meta_step")),
    ("weight model", 2, "call"),  # the weight model has moved already
    ("batch", 2, "call"),  # the meta batch
    ("term", 2, "meta_step"),
    ("term", 5, "meta_step"),  # on the way back
]


def faults(rank):
    clean = trapped(rank)
    wanted = go_on(rank, *clean[:3])
    told = []
    for place, visit, way in FAULTS:
        student, optimizer, balancer, trap = trapped(rank)
        trap.set(place, visit)
        before = student.state_dict(), balancer.state_dict()
        before = copy.deepcopy(before)
        try:
            run(rank, balancer, way)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing")
        assert_same((student.state_dict(), balancer.state_dict()), before, f"{place} {way}")
        trap.set(None)
        torch.testing.assert_close(go_on(rank, student, optimizer, balancer), wanted, rtol=0, atol=0)
    return told


def test_a_rank_that_fails_keeps_no_other_waiting(pair):
    """Wherever it does; all have undone the call, and go on together as if nothing had been."""
    for (place, visit, way), zero, one in zip(FAULTS, *pair(faults, timeout=200), strict=True):
        assert f"in the {place}" in one and "rank" not in one, (place, visit, way, one)
        assert zero.startswith("MetaKDError: rank 1 raised ") and f"in the {place}" in zero, (place, visit, way, zero)
        assert "Here, on rank 0: this rank has undone the call" in zero


def left_alone(rank):
    student, _, balancer = balancer_of(rank)
    student.module[1].register_forward_hook(lambda *_: os._exit(1) if rank == 1 else None)
    with pytest.raises(MetaKDError, match=r"rank 0 cannot reach the others.*look for an error of another rank"):
        balancer(batch(0, rank), batch(0, rank, 1))
    return "told"


@pytest.mark.slow
def test_a_rank_that_dies_is_missed(tmp_path):
    two = Pair(tmp_path)
    assert two(left_alone) == ["told", "gone"]
    two.close()
