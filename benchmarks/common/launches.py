"""The loops whose kernels and host syncs are counted, and a plain one written with torch's own functions."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from benchmarks.common import loops
from benchmarks.common.cases import CASES, Task
from benchmarks.common.counts import count
from benchmarks.common.methods import Call
from metakd import Batch

SHOWN = ("accumulate=1", f"accumulate={loops.PERIOD}", f"every={loops.PERIOD}", "simultaneous")
PEERS = ("published way", "TorchOpt MetaSGD", "higher")


def plain(task: Task) -> Call:
    """Knowledge distillation as one writes it with torch alone: no check of labels, no losses per sample."""
    optimizer = loops.student_optimizer(task)

    def iteration(batch: Batch) -> None:
        logits = task.student(batch.inputs)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(batch.teacher / 4, 1), reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, batch.targets) + 8.0 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return loops.one_by_one(task, iteration)


def count_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels and host syncs of an iteration, after one that is not counted; see `counts`.

    Returns:
        counts: method -> kernels and syncs per iteration, and the commonest operations. failed: method -> why.
    """
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in cell["methods"]:
        period = loops.PERIOD if name in loops.WINDOWS else 1
        task = Task.build(CASES[cell["case"]], loops.PERIOD, batch_size=cell["batch_size"], device=cell["device"])
        try:
            call = METHODS[name](task)
            call()
            counts = count(call)
        except Exception as error:  # a peer may fail in any way
            failed[name] = f"{type(error).__name__}: {error}"[:160]
            continue
        found[name] = {
            "kernels": sum(counts.kernels.values()) / period,
            "syncs": sum(counts.syncs.values()) / period,
            "operations": dict(counts.kernels.most_common(12)),
        }
    return {"counts": found, "failed": failed}


METHODS = {"plain": plain, **{name: loops.METHODS[name] for name in (*SHOWN, *PEERS)}}
CELLS = {"counts": count_cell}
