"""The quick ways: what each of them asks of a hypergradient, how far off it is, and what a student makes of it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import loops, methods
from benchmarks.common.cases import CASES, Task
from benchmarks.common.digits import accuracies
from benchmarks.common.methods import Call
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.methods import bikd
from metakd.estimators import Estimator, FiniteDifference, OneStep
from metakd.longtail import LongTailed, load_images

IMAGES = "METAKD_CIFAR10"
"""The variable that names a folder of CIFAR-10's images, `{train,test}/<class>/*`."""

BATCHES, DRAWS, COMPARED = 10, 4, 2
"""Training batches that take turns; draws of a smaller meta batch; training batches on which errors are taken."""


@dataclass(frozen=True)
class Way:
    """A way to a hypergradient.

    Attributes:
        estimator: of (the classifier's pattern, the last stage's).
        share: of the meta batch.
    """

    estimator: Callable[[str, str], Estimator]
    share: float = 1.0


def exact(classifier: str, stage: str) -> Estimator:
    """All parameters move."""
    return OneStep()


WAYS: dict[str, Way] = {
    "exact": Way(exact),
    "last stage and classifier": Way(lambda classifier, stage: OneStep(parameters=(classifier, stage))),
    "classifier": Way(lambda classifier, stage: OneStep(parameters=(classifier,))),
    "half the meta batch": Way(exact, 0.5),
    "a quarter of the meta batch": Way(exact, 0.25),
    "one-sided difference": Way(lambda classifier, stage: FiniteDifference(sides=1)),
}


def smaller(task: Task, share: float, seed: int = 0) -> Task:
    """The task with a share of its meta batch, drawn at random."""
    meta = task.meta_batch
    size = len(meta.inputs)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: max(round(share * size), 1)]
    parts = [None if t is None else t[chosen.to(t.device)] for t in (meta.inputs, meta.targets, meta.teacher)]
    return task._replace(meta_batch=meta._replace(inputs=parts[0], targets=parts[1], teacher=parts[2]))


def iteration(way: Way, task: Task) -> Call:
    """A whole training iteration."""
    return loops.by_metakd(smaller(task, way.share), estimator=way.estimator(task.classifier, task.stage))


METHODS: dict[str, Callable[[Task], Call]] = {
    "plain": loops.plain,
    **{name: partial(iteration, way) for name, way in WAYS.items()},
}


def with_images(task: Task, folder: Path) -> Task:
    """The task with real images in place of the random ones, the meta batch's from the test images."""
    images = load_images("folder", folder)
    scale = images.train.float().std().item()

    def drawn(values: Tensor, targets: Tensor, sizes: list[int], seed: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        parts = order[: sum(sizes)].split(sizes)
        return [((values[part].float() - 127) / scale, targets[part]) for part in parts]

    sizes = [len(batch.inputs) for batch in task.batches]
    train = drawn(images.train, images.train_targets, sizes, 0)
    ((x, y),) = drawn(images.test, images.test_targets, [len(task.meta_batch.inputs)], 1)
    batches = [b._replace(inputs=i, targets=t) for b, (i, t) in zip(task.batches, train, strict=True)]
    return task._replace(batches=batches, meta_batch=task.meta_batch._replace(inputs=x, targets=y))


def errors_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Relative error and cosine of each way's hypergradient, after so many plain iterations.

    Returns:
        inputs: what the images are. errors: name -> relative errors, one for each batch and draw. cosines: likewise.
    """
    case = CASES[cell["case"]]
    task = Task.build(case, BATCHES, batch_size=cell["batch_size"], device="cpu")
    folder = os.environ.get(IMAGES) if task.batches[0].inputs.ndim == 4 else None
    if folder:
        task = with_images(task, Path(folder))
    train = loops.plain(task)
    for _ in range(cell["after"]):
        train()
    found: dict[str, Any] = {
        "inputs": "CIFAR-10's images" if folder else "random",
        "errors": {name: [] for name in cell["methods"]},
        "cosines": {name: [] for name in cell["methods"]},
    }
    for batch in task.batches[:COMPARED]:
        at = task._replace(batches=[batch])
        right = hypergradient(WAYS["exact"], at)
        for name in cell["methods"]:
            way = WAYS[name]
            for draw in range(DRAWS if way.share < 1 else 1):
                off = hypergradient(way, smaller(at, way.share, draw))
                found["errors"][name].append(float((off - right).norm() / right.norm()))
                found["cosines"][name].append(float(off @ right / (off.norm() * right.norm())))
    return found


def hypergradient(way: Way, task: Task) -> Tensor:
    """That of `BilevelLossBalancer.meta_step`, flat; nothing moves."""
    gradient = methods.by_metakd(way.estimator(task.classifier, task.stage), task)()
    return torch.cat([g.flatten() for g in gradient]).double()


def accuracy_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy of the digits' student by BiKD with each way, all from one teacher and one start.

    Its two layers are the last stage and the classifier.

    Returns:
        accuracy: name -> percent.
    """

    def choose(name: str, data: LongTailed) -> tuple[Learned, LongTailed]:
        way = WAYS[name]
        meta = replace(data.validation, batch_size=max(round(way.share * data.validation.batch_size), 1))
        estimator = way.estimator("3.*", "1.*")
        return Learned(name, bikd(estimator=estimator, accumulate=1)), replace(data, validation=meta)

    return {"accuracy": accuracies(cell, choose)}


CELLS = {"errors": errors_cell, "accuracy": accuracy_cell}
