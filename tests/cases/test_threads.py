"""Balancers in two threads."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint

from metakd import estimators
from tests.cases.real_optimizers import balanced, mlp, seeded, sgd
from tests.cases.real_steps import data


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 2, 2))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint.checkpoint(self.first, x, use_reentrant=False))


def orthogonal() -> nn.Module:
    first = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.stack([x, x.sin(), x.cos()], dim=1)).mean(1))


class Pausing(nn.Module):
    """Lets the other thread go on in the middle of a pass."""

    def __init__(self, net: nn.Module, seconds: float) -> None:
        super().__init__()
        self.net, self.seconds = net, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.net(x)


def training(student: Callable[[], nn.Module], estimator: Any, seed: int, start: Any = None) -> Any:
    """A function that trains for ten iterations; it gives the influences, and whether forward mode is found missing."""
    net = seeded(student)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * seed)
    balancer = balanced(sgd(Pausing(net, 0.001 * (1 + 0.7 * seed))), estimator=estimator)
    batches = [data(seed=s) for s in range(seed, seed + 10)]

    def run() -> tuple[list[Tensor], Any]:
        if start is not None:
            start.wait()
        found = []
        for batch, meta_batch in batches:
            loss = balancer(batch, meta_batch)
            found.append(balancer.report.influence)
            if not isinstance(estimator, estimators.OneStep):
                balancer.meta_step([batch, meta_batch], meta_batch)
                found.append(balancer.weighting.free.grad.clone())
            net.zero_grad()
            loss.backward()
            balancer.optimizer[0].step()
        return found, balancer._memory.forward_mode

    return run


def beside_each_other(student: Callable[[], nn.Module], estimator: Any) -> list[Any]:
    start = threading.Barrier(2)
    runs = [training(student, estimator, seed, start) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run) for run in runs]]


def settings() -> dict[str, Any]:
    """What all threads of a process share."""
    return {
        "onednn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "checkpoints": checkpoint._checkpoint_hook,
        "cache": parametrize._cache,
    }


@pytest.fixture
def shared() -> Iterator[dict[str, Any]]:
    """The settings before the test, which are put back after it."""
    kept = settings()
    yield kept
    torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = kept["onednn"], kept["cudnn"]
    torch.backends.mha.set_fastpath_enabled(kept["fast path"])
    torch.backends.cuda.enable_flash_sdp(kept["flash attention"])
    torch.backends.cuda.enable_mem_efficient_sdp(kept["efficient attention"])
    checkpoint._checkpoint_hook, parametrize._cache = kept["checkpoints"], kept["cache"]


THREADED = [mlp, Sequences, Attention, Checkpointed, orthogonal]


@pytest.mark.slow
@pytest.mark.parametrize("student", THREADED)
@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint()])
def test_two_threads_are_two_trainings(student, estimator, shared):
    one_by_one = [training(student, estimator, seed)() for seed in range(2)]
    for _ in range(3):
        together = beside_each_other(student, estimator)  # a warning there is an error
        for (alone, mode), (found, other) in zip(one_by_one, together, strict=True):
            assert mode == other  # no fall to reverse mode that stays
            for one, another in zip(alone, found, strict=True):
                torch.testing.assert_close(another, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("student", [mlp, Sequences])
def test_two_threads_leave_the_settings_of_the_process_as_they_were(student, shared):
    for _ in range(3):
        beside_each_other(student, estimators.OneStep())
    now = settings()
    assert [name for name in now if now[name] is not shared[name]] == []


def test_copies_of_one_student_in_two_threads(shared):
    """Two balancers of copies of one student keep to their own."""
    student = seeded(mlp)
    balancers = [balanced(sgd(copy.deepcopy(student))) for _ in range(2)]
    batch, meta_batch = data()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda balancer: balancer(batch, meta_batch).backward(), balancers))
    first, second = ([p.grad for p in balancer.student.parameters()] for balancer in balancers)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
