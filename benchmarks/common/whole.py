"""Weights learned through a whole training, beside those learned one step ahead: accuracy, smoothness, cost."""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.clocks import CLOCKS, timed
from benchmarks.common.course import (
    AMONG,
    DECAY,
    GROUP,
    PIECES,
    SAMPLE,
    Course,
    loader,
    rate_at,
    smoothness,
)  # fmt: skip
from benchmarks.common.measure import peak_memory
from benchmarks.common.small_tasks import accuracy, endless, student
from metakd import BilevelLossBalancer, hypergradient
from metakd.batch import tensors
from metakd.weighting import Pinned

OUTER, SIZE = 8, 1.0
"""Outer steps, and how far each moves every free number; a weight is 2 sigmoid(free)."""
DIFFERENCES = (1e-2, 1e-4, 1e-7, 1e-8)
"""Steps of finite differences."""
Found = dict[str, Any]


def given(course: Course, weights: Tensor) -> Found:
    """Train with fixed weights by group, the same all the time."""
    free = (weights / (2 - weights)).log().repeat(PIECES)[:, None]
    return _scores(course, course.trained({**course.equal, GROUP: free})[0])


def one_step(course: Course, anew: bool = False) -> Found:
    """Train with a table of one weight a group, learned one step ahead; or with its last weights from the start."""
    task, steps = course.task, len(course.batches)
    model, optimizer = student(course.seed, type(course.model[1]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at(steps, 1.0))
    table = task.table()
    balancer = BilevelLossBalancer(model, task.terms, optimizer=optimizer, weighting=Pinned(table, AMONG))
    judges = endless(task.meta, torch.Generator().manual_seed(course.seed + 2000))
    for batch in course.batches:
        loss = balancer(batch, next(judges))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if anew:
        return given(course, table.all_weights()[:, 0])
    return {"validation": accuracy(model, task.validation), "test": accuracy(model, task.test)}


def whole(course: Course, begin: float = 0.0) -> Found:
    """Train with weights by group and piece of time that outer steps through the training have found."""
    weights, path = course.descended(GROUP, OUTER, SIZE, int(begin * len(course.batches)))
    params = course.trained(weights)[0]
    path.append((course.meta_loss(params), params))
    table = (2 * weights[GROUP].sigmoid()).view(PIECES, -1)
    return {
        **_scores(course, params),
        "meta loss": [loss for loss, _ in path],
        "path": [_scores(course, at)["test"] for _, at in path],
        "weights": table.tolist(),
    }


def by_sign(course: Course, outer: int) -> Found:
    """Train on the samples whose weight has grown after some outer steps in the weights of single samples."""
    kept = course.descended(SAMPLE, outer, SIZE)[0][SAMPLE][:, 0] > 0
    right = course.task.trusted
    return {
        **_on(course, kept),
        "kept": float(kept.float().mean()),
        "right": float(right[kept].float().mean()),
        "right of dropped": float(right[~kept].float().mean()),
    }


def oracle(course: Course) -> Found:
    """Train on the right labels alone; where all are right, with weights by the inverse of the class counts."""
    if not bool(course.task.trusted.all()):
        return _on(course, course.task.trusted)
    counts = torch.bincount(course.task.train.targets).float()
    return given(course, 1.999 / counts * counts.min())


METHODS: dict[str, Callable[[Course], Found]] = {
    "equal weights": lambda course: _scores(course, course.trained(course.equal)[0]),
    "one step ahead": one_step,
    "one step ahead, its last weights anew": partial(one_step, anew=True),
    "whole training": whole,
    "from the first decay on": partial(whole, begin=DECAY),
    "samples by sign, 1 outer step": partial(by_sign, outer=1),
    f"samples by sign, {OUTER} outer steps": partial(by_sign, outer=OUTER),
    "oracle": oracle,
}


def _on(course: Course, kept: Tensor) -> Found:
    """Train anew, as long, on some of the training images."""
    joined = zip(loader(course.task, course.seed, kept), course.batches, strict=False)
    chosen = [new._replace(columns={**(new.columns or {}), "cell": 0 * new.targets}) for new, _ in joined]
    other = replace(course, batches=chosen)
    return _scores(other, other.trained(other.equal)[0])


def _scores(course: Course, params: Mapping[str, Tensor]) -> Found:
    def percent(batch: Any) -> float:
        return 100 * float((course.outputs(params, batch.inputs).argmax(1) == batch.targets).float().mean())

    return {"validation": percent(course.task.validation), "test": percent(course.task.test)}


def accuracy_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Students of one start under each of the methods, on one task.

    Returns:
        found: name -> validation and test accuracy in percent after the last step, and what else the method knows.
    """
    course = _course(cell)
    return {"found": {name: METHODS[name](course) for name in cell["methods"]}}


def smooth_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the hypergradient at equal weights is right, and how far its signs hold.

    Returns:
        smooth: way -> step h -> `smoothness`, and the meta loss's change and what the hypergradient predicts. The ways
        are the sign of minus the hypergradient by group and by sample, and a random one by group. differences: h ->
        central difference along the latter in float64, over the hypergradient's product with it.
    """
    course = _course(cell)
    equal, gradient = course.equal, hypergradient(**course.problem(course.equal)).gradient
    random = torch.randn(equal[GROUP].shape, generator=torch.Generator().manual_seed(cell["seed"])).sign()
    ways = {
        "groups": (GROUP, -gradient[GROUP].sign()),
        "samples": (SAMPLE, -gradient[SAMPLE].sign()),
        "groups, random": (GROUP, random),
    }
    here = course.trained(equal)[0]
    smooth: dict[str, dict[str, Any]] = {name: {} for name in ways}
    for name, (where, way) in ways.items():
        for h in (0.1, SIZE):
            there, further = (course.trained({**equal, where: equal[where] + k * h * way})[0] for k in (1, 2))
            smooth[name][str(h)] = {
                "smoothness": smoothness(here, there, further),
                "change": course.meta_loss(there) - course.meta_loss(here),
                "predicted": h * float((gradient[where] * way).sum()),
            }
    return {"smooth": smooth, "differences": _differences(course.in_float64(), random.double())}


def _differences(course: Course, way: Tensor) -> dict[str, float]:
    equal = course.equal
    predicted = float((hypergradient(**course.problem(equal)).gradient[GROUP] * way).sum())

    def loss(h: float) -> float:
        return course.meta_loss(course.trained({**equal, GROUP: equal[GROUP] + h * way})[0])

    return {f"{h:g}": (loss(h) - loss(-h)) / (2 * h) / predicted for h in DIFFERENCES}


def _course(cell: Mapping[str, Any]) -> Course:
    return Course.build(cell["task"], cell["seed"], cell["steps"], cell["student"])


def cost_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory of one hypergradient through the whole training.

    Returns:
        plain, hypergradient, one step ahead: seconds, the median of three. memory: `before` and at the `peak` of each,
        in MB. parameters: of the student. kept: MB of the states that `Adjoint` keeps.
    """
    clock = CLOCKS[cell.get("clock", "wall")]
    course = _course(cell)
    hypergradient(**course.until(2).problem(course.equal))
    calls = {
        "plain": lambda: tensors(course.trained(course.equal)),
        "hypergradient": lambda: tensors(hypergradient(**course.problem(course.equal))),
        "one step ahead": lambda: one_step(course) and [],
    }
    memory = {}
    for name, call in calls.items():
        gc.collect()
        memory[name] = peak_memory(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            seconds[name].append(timed(call, clock)[0])
    parameters = sum(p.numel() for p in course.model.parameters())
    return {
        **{name: statistics.median(times) for name, times in seconds.items()},
        "memory": memory,
        "parameters": parameters,
        "kept": 12 * parameters * cell["steps"] / 1e6,
    }


CELLS = {"accuracy": accuracy_cell, "smooth": smooth_cell, "cost": cost_cell}
