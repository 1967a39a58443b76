"""A student of `fully_shard` in two processes is one process's student on the joined batch."""

from array import array

import pytest
import torch

from metakd import MetaKDError, estimators, weighting
from metakd.batch import as_batch
from tests.distributed.pair import SIZE
from tests.distributed.sharded import balancer_of, bits, frozen, recomputing, trained
from tests.distributed.test_joined_batch import joined_rows, same
from tests.distributed.training import PART, batch
from tests.test_no_trace import assert_same


def adam(params):
    return torch.optim.Adam(params, lr=0.02)


CASES = {
    "one_step": {},
    "finite_difference": {"estimator": estimators.FiniteDifference(1e-3)},
    "one_side": {"estimator": estimators.FiniteDifference(1e-3, sides=1)},
    "identity_jacobian": {"estimator": estimators.IdentityJacobian()},
    "some_parameters": {"estimator": estimators.OneStep(parameters=["blocks.1.*", "head.*"])},
    "adam_mirrored": {"optimizer": adam, "inner": "mirror"},
    "kept_whole": {"fsdp": {"reshard_after_forward": False}},
    "accumulated": {"accumulate": 3},
    "now_and_then": {"every": 2},
    "frozen": {"build": frozen},
    "recomputing": {"build": recomputing},
    "recomputing_differences": {"build": recomputing, "estimator": estimators.FiniteDifference(1e-3)},
    "rectified": {"model": lambda: weighting.Rectified(2)},
    "sample_table": {"model": lambda: weighting.SampleTable(SIZE * PART, 2).double()},
}
AHEAD = {
    "differences_ahead": {"estimator": estimators.FiniteDifference(1e-3)},
    "differences_mirrored": {"estimator": estimators.FiniteDifference(1e-3), "inner": "mirror", "optimizer": adam},
    "identity_ahead": {"estimator": estimators.IdentityJacobian(), "accumulate": 2},
}


def case(rank, name, *args):
    return trained(rank, *args, **(CASES | AHEAD)[name])


def compare(pair, name, *args):
    ranks, wanted = pair(case, name, *args), case(None, name, *args)
    for found in ranks:
        for what in ("student", "gradients", "weight model", "hypergradient", "of all"):
            same(found[what], wanted[what])
    same(joined_rows(ranks), wanted["rows"])
    assert_same(ranks[0]["weight model"], ranks[1]["weight model"])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_parts_are_one_process_on_the_joined_batch(pair, name):
    compare(pair, name)


@pytest.mark.parametrize("name", AHEAD)
def test_several_steps_ahead_of_parts(pair, name):
    compare(pair, name, 3)


def untouched(rank):
    """After a call the parts, their gradients and the optimizer's state have the bits that they had before it."""
    for setting in ({}, {"estimator": estimators.FiniteDifference()}, {"fsdp": {"reshard_after_forward": False}}):
        student, optimizer, balancer = balancer_of(rank, inner="mirror", **setting)
        balancer(batch(0, rank), batch(0, rank, 1)).backward()
        optimizer.step()
        before = bits(student), [p.grad.to_local().clone() for p in student.parameters()]
        state = [b.to_local().clone() for s in optimizer.state.values() for b in s.values()]
        loss = balancer(batch(1, rank), batch(1, rank, 1))
        balancer.weights(batch(2, rank))
        assert_same((bits(student), [p.grad.to_local() for p in student.parameters()]), before)
        assert_same([b.to_local() for s in optimizer.state.values() for b in s.values()], state)
        optimizer.zero_grad()
        loss.backward()
        mine = [p.grad.to_local().clone() for p in student.parameters()]
        optimizer.zero_grad()
        read, weights = as_batch(batch(1, rank)), balancer.report.weights
        outputs = student(read.inputs)
        losses = torch.stack([term(outputs, read) for term in balancer.terms.values()], 1)
        (weights / PART * losses).sum().backward()
        assert_same(mine, [p.grad.to_local() for p in student.parameters()])


def test_a_call_leaves_the_bits_of_all_parts(pair):
    pair(untouched)


class _FailsAt:
    """A term that fails in its n-th evaluation, which it counts where nothing is put back."""

    def __init__(self):
        self.left = array("q", [10**6])

    def __call__(self, outputs, batch):
        self.left[0] -= 1
        if not self.left[0]:
            raise ZeroDivisionError("the n-th time")
        return outputs.square().sum(1)


def failing(rank):
    student, _, balancer = balancer_of(rank, verify=False)
    fails = balancer.terms["smooth"] = _FailsAt()
    hook = student.blocks[1].register_forward_pre_hook(lambda *_: fails(torch.ones(1, 1), None) and None)
    balancer(batch(0, rank), batch(0, rank, 1))
    number, wanted = 10**6 - fails.left[0], balancer.loss(batch(1, rank))
    before = bits(student)
    for n in range(1, number + 1):  # in the real pass, at theta', along u; inside the student and after it
        fails.left[0] = n
        with pytest.raises((MetaKDError, ZeroDivisionError)):
            balancer(batch(0, rank), batch(0, rank, 1))
        assert_same(bits(student), before)
        fails.left[0] = 10**6
        assert_same(balancer.loss(batch(1, rank)), wanted)
    hook.remove()
    balancer(batch(0, rank), batch(0, rank, 1)).backward()
    return number


def test_a_failed_pass_leaves_the_bits_of_all_parts(pair):
    assert pair(failing)[0] >= 5
