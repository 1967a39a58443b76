"""Two processes are one process on the joined batch."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, estimators, weighting
from tests.distributed.pair import SIZE
from tests.distributed.training import PART, balancer_of, batch, momentum, plain


class Branches(nn.Module):
    """A rank whose samples all go one way leaves the other branch's parameters out of its graph; one is never used."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(1, 1)

    def forward(self, x):
        goes_left = x[:, :1] > 0
        z = x.new_zeros(len(x), 3)
        if goes_left.any():
            z = z + goes_left * self.left(x).tanh()
        if not goes_left.all():
            z = z + ~goes_left * self.right(x).tanh()
        return z


class InParts(nn.Module):
    """Each rank's part of the batch on its own, as BatchNorm meets it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat([self.module(part) for part in x.split(PART)])


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def hooked():
    student = plain()
    student[0].weight.register_hook(lambda g: 3 * g)
    return student


def adam(params):
    return torch.optim.Adam(params, lr=0.02)


def trained(rank, setting, ahead=0, micro=1, steps=4):
    """All that is learned in a few steps: by one process where rank is None."""
    student, optimizer, balancer = balancer_of(rank, **setting)
    seen = []
    for step in range(steps):
        if ahead:
            seen.append(balancer.meta_step([batch(7 * step + t, rank) for t in range(ahead)], batch(step, rank, 1)))
        optimizer.zero_grad()
        for i in range(micro):
            silent = student.no_sync() if rank is not None and i < micro - 1 else contextlib.nullcontext()
            with silent:
                loss = balancer(batch(micro * step + i, rank), None if ahead else batch(step, rank, 1))
                loss.backward()
        seen.append(balancer.report)
        optimizer.step()
    return {
        "student": [p.detach() for p in student.parameters()],
        "gradients": [p.grad for p in student.parameters()],
        "weight model": [p.detach() for p in balancer.weighting.parameters()],
        "hypergradient": [p.grad for p in balancer.weighting.parameters()],
        "of all": [(report.meta_loss, report.hypergradient_norm) for report in seen],
        "rows": [(report.losses, report.weights, report.influence) for report in seen],
    }


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def joined_rows(ranks):
    return [
        tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*reports, strict=True))
        for reports in zip(*(rank["rows"] for rank in ranks), strict=True)
    ]


CASES = {
    "momentum": {},
    "reverse": {"estimator": estimators.OneStep("reverse")},
    "finite_difference": {"estimator": estimators.FiniteDifference(1e-2)},
    "adam_mirrored": {"optimizer": adam, "inner": "mirror"},
    "handed_over": {"accumulate": 3},
    "now_and_then": {"every": 2},
    "branches": {
        "build": Branches,
        "inner": "mirror",
        "accumulate": 2,
        "ddp": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    },
    "hooked": {"build": hooked},
    "batch_norm": {"build": normed, "wrap": InParts},
    "rectified": {"model": lambda: weighting.Rectified(2)},
    "sample_table": {"model": lambda: weighting.SampleTable(SIZE * PART, 2).double()},
}

AHEAD = {
    "adjoint": {"estimator": estimators.Adjoint()},
    "adjoint_mirrored": {"estimator": estimators.Adjoint("forward"), "inner": "mirror", "optimizer": adam},
    "adjoint_auto": {"estimator": estimators.Adjoint("auto")},
    "truncated": {"estimator": estimators.Truncated(2), "accumulate": 2},
    "identity_jacobian": {"estimator": estimators.IdentityJacobian()},
    "finite_differences": {"estimator": estimators.FiniteDifference()},
    "implicit": {"estimator": estimators.Implicit(steps=5, damping=1.0)},
    "neumann": {"estimator": estimators.Implicit("neumann", steps=5, damping=1.0)},
    "routes": {"estimator": estimators.Adjoint(), "build": Branches, "ddp": {"find_unused_parameters": True}},
}


def case(rank, setting, *args):
    return trained(rank, (CASES | AHEAD)[setting], *args)


def compare(pair, setting, *args):
    ranks, wanted = pair(case, setting, *args), case(None, setting, *args)
    for found in ranks:
        for what in ("student", "gradients", "weight model", "hypergradient", "of all"):
            same(found[what], wanted[what])
    same(joined_rows(ranks), wanted["rows"])
    for what in ("student", "weight model", "of all"):
        torch.testing.assert_close(ranks[0][what], ranks[1][what], rtol=0, atol=0)


@pytest.mark.parametrize("setting", CASES)
def test_two_ranks_are_one_process_on_the_joined_batch(pair, setting):
    compare(pair, setting)


@pytest.mark.parametrize("setting", AHEAD)
def test_several_steps_ahead(pair, setting):
    compare(pair, setting, 3)


def test_gradients_that_wait_for_later_batches(pair):
    compare(pair, "momentum", 0, 3)
    compare(pair, "handed_over", 0, 3)


def compiled(rank):
    student, _, balancer = balancer_of(rank)
    again = balancer.student if rank is None else torch.compile(student, backend="aot_eager")
    optimizer = momentum(student.parameters())
    model = copy.deepcopy(balancer.weighting)
    balancer = BilevelLossBalancer(again, balancer.terms, optimizer=optimizer, weighting=model, accumulate=2)
    for step in range(3):
        optimizer.zero_grad()
        balancer(batch(step, rank), batch(step, rank, 1)).backward()
        optimizer.step()
    return [p.detach() for p in (*student.parameters(), *model.parameters())]


def test_compiled(pair):
    for found in pair(compiled):
        same(found, compiled(None))
