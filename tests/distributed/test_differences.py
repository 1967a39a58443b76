"""Ranks that do not the same, and students that several processes cannot share, are named."""

import re

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from metakd import BilevelLossBalancer, MetaKDError, estimators, terms, validate, weighting
from tests.distributed.training import balancer_of, batch, momentum, plain


def mine(rank, one, other):
    return one if rank == 0 else other


def edited(balancer):
    with torch.no_grad():
        next(balancer.weighting.parameters()).add_(1.0)


def disagreement(rank, balancer, other):
    """Each rank does something else, after one call together."""
    parts, meta = batch(0, rank), batch(0, rank, 1)
    if other == "no meta batch":
        balancer(parts, mine(rank, meta, None))
    elif other == "no gradients":
        with mine(rank, torch.enable_grad, torch.no_grad)():
            balancer(parts, meta)
    elif other == "a meta step":
        mine(rank, lambda: balancer(parts, meta), lambda: balancer.meta_step([parts], meta))()
    elif other == "more steps ahead":
        balancer.meta_step([parts] * mine(rank, 2, 3), meta)
    elif other == "fewer batches":
        for _ in balancer.windows([parts] * mine(rank, 4, 3), [meta], 2):
            pass
    elif other == "a smaller batch":
        balancer(mine(rank, parts, tuple(t[:4] for t in parts)), meta)
    elif other == "join":
        with balancer.student.join():
            balancer(parts, meta)
    else:
        balancer(parts, meta)


OTHERS = {
    "no meta batch": ({}, None, "rank 0 is at call 2, with a hypergradient.*rank 1 is at call 2, without"),
    "no gradients": ({}, None, "a hypergradient needs gradients"),
    "a meta step": ({"estimator": estimators.Adjoint()}, None, "0 is at call 2.*1 is at a meta step through 1"),
    "more steps ahead": ({"estimator": estimators.Adjoint()}, None, "through 2 batches.*through 3 batches"),
    "fewer batches": ({"estimator": estimators.Adjoint()}, None, "a window of 2 batches.*a window of 1 batches"),
    "a smaller batch": ({"model": lambda: weighting.Rectified(2)}, None, r"shape \(6, 2\).*shape \(4, 2\)"),
    "join": ({}, None, r"join\(\) keeps ranks waiting"),
    "another call": ({}, lambda b: b.load_state_dict(b.state_dict() | {"calls": 7}), "at call 2.*at call 8"),
    "another weight model": ({}, edited, "0 of 1 gathered, with the weight model"),
    "more gathered": ({"accumulate": 3}, lambda b: setattr(b, "accumulate", 4), "1 of 3 gathered.*1 of 4 gathered"),
}


def disagreements(rank):
    told = {}
    for other, (options, change, _) in OTHERS.items():
        _, _, balancer = balancer_of(rank, **options)
        balancer(batch(0, rank), batch(0, rank, 1))
        if change is not None and rank == 1:
            change(balancer)
        with pytest.raises(MetaKDError) as error:
            disagreement(rank, balancer, other)
        told[other] = str(error.value)
    with pytest.raises(MetaKDError) as error:
        _, _, balancer = balancer_of(rank, model=lambda: weighting.LossMLP(2, 2, (3 + rank,)).double())
        balancer(batch(0, rank), batch(0, rank, 1))
    return told | {"another size": str(error.value)}


def test_ranks_that_differ_hear_of_it(pair):
    for told in pair(disagreements):
        for other, (_, _, words) in OTHERS.items():
            assert re.search(words, told[other]), (other, told[other])
        assert "17 numbers in 4 tensors; rank 1 is at a weight model of 22 numbers" in told["another size"]


def refused(rank):
    assert {finding.level for finding in validate(DistributedDataParallel(plain()))} == {"note"}
    with pytest.raises(MetaKDError, match=r"static_graph=True .*Leave static_graph out"):
        balancer_of(rank, ddp={"static_graph": True})
    with pytest.warns(UserWarning, match=r"not in DistributedDataParallel.*each of the 2 processes"):
        BilevelLossBalancer(student := plain(), [terms.CrossEntropy()], optimizer=momentum(student.parameters()))
    _, _, balancer = balancer_of(rank, estimator=estimators.Unroll())
    with pytest.raises(MetaKDError, match=r"Unroll records one graph.*use estimators.Adjoint\(\)"):
        balancer.meta_step([batch(0, rank)], batch(0, rank, 1))


def test_what_is_refused_by_name(pair):
    pair(refused)
