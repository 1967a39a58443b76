"""A sharded student, its optimizer and its balancer are saved and go on to the same numbers."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from metakd import MetaKDError, estimators
from tests.distributed.sharded import balancer_of, bits
from tests.distributed.training import batch
from tests.test_no_trace import assert_same


def adam(params):
    return torch.optim.AdamW(params, lr=0.02)


def steps(rank, built, numbers):
    student, optimizer, balancer = built
    for n in numbers:
        loss = balancer(batch(n, rank), batch(n, rank, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bits(student), balancer.state_dict(), balancer.report.weights, balancer.report.influence


def save(rank, built, folder):
    """As on the page: the sharded states by all ranks, the balancer's by one."""
    student, optimizer, balancer = built
    model, state = get_state_dict(student, optimizer)
    checkpoints.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    if rank == 0:
        torch.save(balancer.state_dict(), f"{folder}/balancer.pt")
    dist.barrier()


def load(built, folder):
    student, optimizer, balancer = built
    model, state = get_state_dict(student, optimizer)
    found = {"model": model, "optimizer": state}
    checkpoints.load(found, checkpoint_id=folder)
    set_state_dict(student, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    balancer.load_state_dict(torch.load(f"{folder}/balancer.pt", weights_only=True))


def resumed(rank, setting, folder):
    options = {"inner": "mirror", "optimizer": adam, **SETTINGS[setting]}
    first = balancer_of(rank, **options)
    steps(rank, first, range(3))
    save(rank, first, folder)
    wanted = steps(rank, first, range(3, 6))
    again = balancer_of(rank, **options)
    steps(rank, again, range(7, 9))  # another state, which loading must replace
    load(again, folder)
    assert_same(steps(rank, again, range(3, 6)), wanted)
    with pytest.raises(MetaKDError, match="was saved with the terms"):
        again[2].load_state_dict({**again[2].state_dict(), "terms": ["other"]})


SETTINGS = {"one_step": {}, "mid_way": {"accumulate": 2, "estimator": estimators.FiniteDifference()}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sharded_student_goes_on_where_it_was_saved(pair, setting, tmp_path):
    pair(resumed, setting, str(tmp_path))
