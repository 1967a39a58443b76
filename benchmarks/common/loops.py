"""The loops: each takes a task and returns a function that trains on it for one iteration, or for a period of them.

An iteration is all that a user's loop does for a batch, the student's own step included.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.common import methods
from benchmarks.common.cases import Task, differentiable_kernels
from benchmarks.common.methods import Call
from metakd import Batch, BilevelLossBalancer, MetaKDError
from metakd._call.replay import WARM_UP, Replay
from metakd.estimators import Estimator, OneStep
from metakd.weighting.base import default_optimizer

PERIOD = 5


def plain(task: Task, graph: bool = False) -> Call:
    """The unit of time: knowledge distillation with fixed weights."""
    optimizer = student_optimizer(task)

    def iteration(batch: Batch) -> None:
        batch = task.taught(batch)
        loss = task.losses(task.student(batch.inputs), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    device = next(task.student.parameters()).device
    return one_by_one(task, Replay(iteration, device) if graph else iteration)


def by_metakd(
    task: Task,
    window: str | None = None,
    estimator: Estimator = OneStep(),  # noqa: B008 (frozen)
    verify: bool = True,
    order: str = "sequential",
    graph: bool = False,
) -> Call:
    """`BilevelLossBalancer`; with a `window`, `accumulate` or `every`, a call is one iteration on each batch."""
    optimizer, count = student_optimizer(task), len(task.batches) if window else 1
    balancer = BilevelLossBalancer(
        task.student,
        task.terms,
        optimizer=optimizer,
        weighting=task.weighting,
        weighting_optimizer=default_optimizer(task.weighting),
        teacher=task.teacher,
        features=lambda losses, outputs, batch: losses,
        estimator=estimator,
        verify=verify,
        order=order,
        **({window: count} if window else {}),
    )

    def iteration(batch: Batch) -> None:
        loss = balancer(batch, task.meta_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one_by_one(task, balancer.capture(iteration) if graph else iteration, count)


def by_peer(hypergradient: Callable[[Task], Call], task: Task) -> Call:
    """A peer's hypergradient, the weight model's step, then a second forward pass under the new weights."""
    optimizer, weighting_optimizer = student_optimizer(task), default_optimizer(task.weighting)

    def iteration(batch: Batch) -> None:
        batch = task.taught(batch)
        gradient = hypergradient(task._replace(batches=[batch]))()
        for p, g in zip(task.weighting.parameters(), gradient, strict=True):
            p.grad = g
        weighting_optimizer.step()
        losses = task.losses(task.student(batch.inputs), batch)
        with torch.no_grad():
            weights = task.weighting(losses, batch)
        loss = (weights * losses).sum() / len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one_by_one(task, iteration)


def published(task: Task) -> Call:
    """The hypergradient of the published codes: a copy of the student, and `backward` of the meta loss through it."""

    def call() -> Sequence[Tensor]:
        (batch,), student = task.batches, copy.deepcopy(task.student)
        params = dict(student.named_parameters())
        with differentiable_kernels(student):
            loss = task.inner(student(batch.inputs), batch)
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            ahead = {name: p - task.lr * g for (name, p), g in zip(params.items(), gradients, strict=True)}
            meta_loss = task.outer(functional_call(student, ahead, task.meta_batch.inputs))
            task.weighting.zero_grad()
            meta_loss.backward()
        return [p.grad for p in task.weighting.parameters() if p.grad is not None]

    return call


def metasgd_on_a_copy(task: Task) -> Call:
    """`torchopt.MetaSGD` replaces the parameters of its module, where the student's optimizer would not find them."""
    return methods.by_torchopt(task._replace(student=copy.deepcopy(task.student)))


def compiled(loop: Callable[[Task], Call], task: Task) -> Call:
    """A loop whose student is compiled; metakd's virtual passes run it as written."""
    return loop(task._replace(student=torch.compile(task.student)))


def graphed(loop: Callable[..., Call], task: Task) -> Call:
    """A loop whose iteration is a CUDA graph, captured already.

    Raises:
        MetaKDError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise MetaKDError("CUDA graphs need a GPU")
    call = loop(task, graph=True)
    for _ in range(WARM_UP + 2):  # in the first one the optimizers get a state
        call()
    return call


def student_optimizer(task: Task) -> torch.optim.Optimizer:
    # One kernel for all parameters, as is torch's default on a GPU.
    return torch.optim.SGD(task.student.parameters(), task.lr, momentum=0.9, weight_decay=5e-4, foreach=True)


def one_by_one(task: Task, iteration: Callable[[Batch], None], count: int = 1) -> Call:
    """Calls of so many iterations each, which take the task's batches in turn."""
    batches = cycle(task.batches)

    def call() -> Sequence[Tensor]:
        for _ in range(count):
            iteration(next(batches))
        return ()

    return call


METHODS: dict[str, Callable[[Task], Call]] = {
    "plain": plain,
    "accumulate=1": by_metakd,
    f"accumulate={PERIOD}": partial(by_metakd, window="accumulate"),
    f"every={PERIOD}": partial(by_metakd, window="every"),
    "simultaneous": partial(by_metakd, order="simultaneous"),
    "published way": partial(by_peer, published),
    "by hand": partial(by_peer, methods.by_hand),
    "TorchOpt MetaSGD": partial(by_peer, metasgd_on_a_copy),
    "higher": partial(by_peer, methods.by_higher),
    "4 terms": lambda task: by_metakd(task.with_terms(4)),
    "8 terms": lambda task: by_metakd(task.with_terms(8)),
}
MODES: dict[str, Callable[[Task], Call]] = {
    "plain, compiled": partial(compiled, plain),
    "accumulate=1, compiled": partial(compiled, by_metakd),
    "plain, CUDA graph": partial(graphed, plain),
    "accumulate=1, CUDA graph": partial(graphed, by_metakd),
    f"accumulate={PERIOD}, CUDA graph": partial(graphed, partial(by_metakd, window="accumulate")),
    f"every={PERIOD}, CUDA graph": partial(graphed, partial(by_metakd, window="every")),
    "simultaneous, CUDA graph": partial(graphed, partial(by_metakd, order="simultaneous")),
}
"""Other ways to run a loop, which are asked for by name."""
METHODS |= MODES
WINDOWS = tuple(name for name in METHODS if name.startswith((f"accumulate={PERIOD}", f"every={PERIOD}")))
"""Those whose calls are a period of iterations."""
WITH_TEACHER = ("accumulate=1", f"accumulate={PERIOD}", f"every={PERIOD}", "published way")
