"""The meta images among the training images, on the small tasks with one term."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.small_tasks import TASKS, Task, accuracy, batches, endless, rows_of, student
from metakd import Batch, BilevelLossBalancer, meta_in_training
from metakd.weighting import Pinned


class Method(NamedTuple):
    """How the meta images are used.

    Attributes:
        learns: whether weights are learned; else all training images count 1, or 0.
        among: the meta images' weight among the training images; None if they are not there.
        folds: parts of the meta set of which one is trained on and the next one judges; 1 for the whole set.
        swaps: whether the parts take turns.
        training: the weight of the training images where nothing is learned.
    """

    learns: bool
    among: float | None
    folds: int = 1
    swaps: bool = True
    training: float = 1.0


METHODS_WITH_META = {
    "meta images alone": Method(False, 1.0, training=0.0),
    "equal weights": Method(False, None),
    "equal weights + meta at 1": Method(False, 1.0),
    "learned": Method(True, None),
    "learned + meta at 1": Method(True, 1.0),
    "learned + meta at 0.3": Method(True, 0.3),
    "learned + meta at 1, two parts in turns": Method(True, 1.0, folds=2),
    "learned + meta at 1, two fixed parts": Method(True, 1.0, folds=2, swaps=False),
}


def meta_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Students of one start under each of the methods, on one task.

    Returns:
        found: name -> validation and test accuracy in percent after the last epoch; with learned weights the mean meta
        loss of the last epoch.
    """
    task = TASKS[cell["task"]](cell["seed"])
    return {
        "found": {
            name: trained(task, METHODS_WITH_META[name], cell["seed"], cell["epochs"]) for name in cell["methods"]
        }
    }


def trained(task: Task, method: Method, seed: int, epochs: int) -> dict[str, float]:
    """Train one student; see `meta_cell`."""
    model, optimizer = student(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    weighting = Pinned(task.table(), 1.0 if method.among is None else method.among)
    balancer = BilevelLossBalancer(model, task.terms, optimizer=optimizer, weighting=weighting)
    losses: list[float] = []
    for epoch, pairs in enumerate(_epochs(task, method, seed, epochs)):
        for batch, meta_batch in pairs:
            if method.learns:
                loss = balancer(batch, meta_batch)
                if epoch == epochs - 1 and balancer.report.meta_loss is not None:
                    losses.append(float(balancer.report.meta_loss))
            else:
                loss = (
                    fixed(method, batch) * F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
                ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    found = {"validation": accuracy(model, task.validation), "test": accuracy(model, task.test)}
    return found | ({"meta loss": statistics.mean(losses)} if losses else {})


def fixed(method: Method, batch: Batch) -> Tensor:
    """The fixed weights of a joined batch."""
    from_meta = (batch.columns or {}).get("from_meta", torch.zeros(len(batch.targets)))
    return torch.where(from_meta == 1, float(method.among or 0.0), method.training)


def _epochs(task: Task, method: Method, seed: int, epochs: int) -> Iterator[Iterator[tuple[Batch, Batch]]]:
    """The pairs of each epoch: a training batch and the meta batch that judges it."""
    order, meta_order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    parts = [rows_of(task.meta, torch.arange(len(task.meta.targets))[k :: method.folds]) for k in range(method.folds)]
    loaders = tuple(endless(part, meta_order) for part in parts)
    for _ in range(epochs):
        train = batches(task.train, order)
        if method.among is None:
            yield zip(train, loaders[0], strict=False)
        elif method.swaps:
            yield meta_in_training(train, loaders)
        else:
            joined = (batch for batch, _ in meta_in_training(train, loaders[0]))
            yield zip(joined, loaders[-1], strict=False)
