"""Tables of weights at several learning rates, on the small tasks."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.common.small_tasks import BATCH, TASKS, Task, accuracy, batches, endless, rows_of, student
from benchmarks.common.with_meta import meta_cell
from metakd import BilevelLossBalancer, MetaKDError
from metakd.terms import evaluate

RATES = {"bounded": (1e-3, 0.01, 0.03, 0.1, 0.3, 1.0), "softplus": (1e-3, 0.1, 0.3)}
FIXED = ("equal weights", "right labels alone")
LEARNED = {f"{output}, {rate:g}": (output, rate) for output, rates in RATES.items() for rate in rates}
LEARNED["bounded, 0.1, decay 0.0001"] = ("bounded", 0.1)
NAMES = (*FIXED, *LEARNED)


def rates_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Students of one start under each of the methods, on one task.

    Returns:
        found: name -> validation and test accuracy in percent after the last epoch, and the lowest and the highest
        weight; failed: name -> why, where training diverged.
    """
    task = TASKS[cell["task"]](cell["seed"])
    found, failed = {}, {}
    for name in cell["methods"]:
        try:
            found[name] = trained(task, name, cell["seed"], cell["epochs"])
        except MetaKDError as error:
            failed[name] = str(error)[:160]
    return {"found": found, "failed": failed}


def trained(task: Task, name: str, seed: int, epochs: int) -> dict[str, float]:
    """Train one student; see `rates_cell`."""
    model, optimizer = student(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order, meta_order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    meta = endless(task.meta, meta_order)
    train = rows_of(task.train, task.trusted.nonzero().flatten()) if name == "right labels alone" else task.train
    balancer = None
    if name in LEARNED:
        output, rate = LEARNED[name]
        table = task.table(output=output)
        decay = 1e-4 if "decay" in name else 0.0
        steps = torch.optim.Adam(table.parameters(), lr=rate, weight_decay=decay)
        balancer = BilevelLossBalancer(
            model, task.terms, optimizer=optimizer, weighting=table, weighting_optimizer=steps
        )
    for _ in range(epochs):
        for batch in batches(train, order):
            if balancer is not None:
                loss = balancer(batch, next(meta))
            else:
                loss = evaluate(task.terms, model(batch.inputs), batch).sum() / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    result = {"validation": accuracy(model, task.validation), "test": accuracy(model, task.test)}
    if balancer is not None:
        weights = torch.cat([balancer.weights(batch) for batch in batches(task.train, order)])
        result |= {"low": float(weights.min()), "high": float(weights.max())}
    if not all(map(math.isfinite, result.values())):
        raise MetaKDError("training diverged")
    return result


METHODS: dict[str, Any] = {}
CELLS = {"rates": rates_cell, "meta": meta_cell}
