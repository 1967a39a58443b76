"""The training of one network, which resumes where it stopped."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from benchmarks.longtail import snapshots
from benchmarks.longtail.figures import POINTS, saved
from benchmarks.longtail.methods import Method
from benchmarks.longtail.presets import Preset
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.steps import Replayed, as_written, replays
from metakd import History, diagnose
from metakd.longtail import Checkpoint, LongTailed, evaluate, group_classes

SAVE_EVERY = 20.0
"""Seconds between two checkpoints of a run in a hurry; of others each epoch has one."""
MARGIN = 1.5
"""An epoch is started if this many times the last epochs' longest is left."""


class Unfinished(Exception):
    """A training had to stop before its end, to go on later."""

    def __init__(self, name: str, done: int, epochs: int) -> None:
        super().__init__(f"{name}: {done} of {epochs} epochs are done; the same command goes on")


class Where(NamedTuple):
    """What does not decide a cell's numbers (but for rounding).

    Attributes:
        data_root: the images, or where to download them to; mosaics in `<dataset>` there are taken first.
        image_folder: whether `data_root` holds trees of pictures, `<dataset>/{train,test}/<class>/*`.
        work: checkpoints.
        device: to train on.
        fast: iterations as CUDA graphs where they can be captured, the teacher's passes in bfloat16.
        teachers: where trained teachers are kept, rounded to eight bits; None keeps their checkpoints instead.
        until: of `time.monotonic`; no epoch starts that would not end before it.
    """

    data_root: Path | None
    image_folder: bool
    work: Path
    device: str
    fast: bool = False
    teachers: Path | None = None
    until: float | None = None

    def checkpoint_of(self, name: str) -> Path:
        """The file of a run that is not done."""
        return self.work / f"{name}.pt"

    def deciding(self) -> dict[str, bool]:
        """What decides the rounding: a checkpoint does not go on with other settings."""
        return {key: True for key, chosen in (("fast", self.fast), ("rounded teacher", self.teachers)) if chosen}


def slowest(history: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of the slowest one of the last epochs."""
    return max((float(entry["seconds"]) for entry in history[-5:]), default=0.0)


def optimizer_of(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The student's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=preset.lr, momentum=0.9, weight_decay=5e-4)


def fit(
    name: str,
    settings: Mapping[str, Any],
    preset: Preset,
    where: Where,
    model: nn.Module,
    teacher: nn.Module | None,
    data: LongTailed,
    method: Method,
    milestones: Iterable[float],
) -> dict[str, Any]:
    """Train, epoch by epoch, with checkpoints between them; the record of the run.

    Raises:
        Unfinished: the next epoch would not end in time; a checkpoint holds the training so far.
    """
    optimizer = optimizer_of(model, preset)
    at = [max(round(share * preset.epochs), 1) for share in milestones]
    scheduler = MultiStepLR(optimizer, at)
    objective = method(Setting(model, teacher or nn.Identity(), optimizer, data.counts, preset))
    balancer, seen = objective.balancer, None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **objective.parts}
    weighting_scheduler = None
    if balancer is not None:
        seen = parts["seen"] = History(balancer.terms, len(data.classes), points=POINTS)
        if balancer.weighting_optimizer is not None:
            weighting_scheduler = MultiStepLR(balancer.weighting_optimizer, at, gamma=0.8)
            parts["weighting_scheduler"] = weighting_scheduler
    checkpoint = Checkpoint(where.checkpoint_of(name), {**settings, **where.deciding()}, parts)
    history, saved_at = checkpoint.load(), time.monotonic()
    replayed = None
    if where.fast and replays(objective):
        replayed = Replayed(objective, optimizer, half=teacher is None)
    groups = group_classes(data.counts)
    for epoch in range(len(history), preset.epochs):
        if where.until is not None and time.monotonic() + MARGIN * slowest(history) > where.until:
            checkpoint.save(history)
            raise Unfinished(name, epoch, preset.epochs)
        start, total = time.perf_counter(), torch.zeros((), device=where.device)
        model.train()
        batches, meta = data.train.epoch(epoch), data.validation.endless(epoch)
        if replayed is not None:
            losses = replayed.epoch(epoch, batches, meta)
        else:
            losses = as_written(objective, optimizer, epoch, batches, meta)
        for batch, loss in losses:
            total += loss.detach()
            if balancer is not None and seen is not None:
                seen.add(balancer.report, batch.targets)
        scheduler.step()
        if weighting_scheduler is not None:
            weighting_scheduler.step()
        entry: dict[str, Any] = {"epoch": epoch + 1, "train_loss": float(total) / len(data.train)}
        entry["seconds"] = round(time.perf_counter() - start, 3)
        looked_at, last = (epoch + 1) % preset.evaluate_every == 0, epoch + 1 == preset.epochs
        if looked_at and not last:
            entry["test"] = evaluate(model, data.test.plain(), groups).overall
            entry["validation"] = evaluate(model, data.validation.plain(), groups).overall
        if (looked_at or last) and balancer is not None and snapshots.weighs_by_loss(balancer):
            entry["weights_by_loss"] = snapshots.taken(balancer, data.train.epoch(epoch))
        history.append(entry)
        if not where.fast or last or time.monotonic() - saved_at > SAVE_EVERY:
            checkpoint.save(history)
            saved_at = time.monotonic()
    found = {
        "test": evaluate(model, data.test.plain(), groups)._asdict(),
        "validation": evaluate(model, data.validation.plain(), groups)._asdict(),
        "seconds": round(sum(entry["seconds"] for entry in history), 1),
        "classes": list(data.classes),
        "counts": list(data.counts),
        "history": history,
    }
    if balancer is None or seen is None:
        return found
    learned = {"terms": list(balancer.terms), "history": saved(seen)}
    if any(p.requires_grad for p in balancer.weighting.parameters()):
        learned["diagnosis"] = str(diagnose(balancer, data.train.epoch(0), data.validation.endless(0)))
    return found | {"learned": learned}
