"""One cell: train a network by one method, resume where it stopped, and say how well it does."""

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from benchmarks.longtail import snapshots
from benchmarks.longtail.figures import POINTS, saved
from benchmarks.longtail.fixed import Fixed
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.methods import Method
from benchmarks.longtail.presets import DECAYS, Preset
from benchmarks.longtail.setting import Setting
from metakd import History, diagnose, terms
from metakd.longtail import Checkpoint, Images, LongTailed, build_model, evaluate, group_classes, load_images

TEACHER = Fixed("Teacher", lambda counts: {"hard": (1.0, terms.CrossEntropy())})


class Cell(NamedTuple):
    """What a row's numbers are made of."""

    dataset: str
    imbalance: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.dataset}-{self.imbalance:g}/{self.method}-{self.seed}"


class Where(NamedTuple):
    """What does not decide a cell's numbers (but for rounding).

    Attributes:
        data_root: the images, or where to download them to.
        image_folder: whether `data_root` holds trees of pictures, `<dataset>/{train,test}/<class>/*`.
        work: checkpoints.
        device: to train on.
    """

    data_root: Path | None
    image_folder: bool
    work: Path
    device: str


@cache
def images_of(dataset: str, where: Where) -> Images:
    """The whole data set."""
    if where.image_folder and where.data_root is not None:
        images = load_images("folder", where.data_root / dataset)
    else:
        images = load_images(dataset, where.data_root)
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(dataset, dataset)
    return replace(images, title=title, name=title) if where.image_folder else images


def data_of(cell: Cell, preset: Preset, where: Where) -> LongTailed:
    """The cell's long tail; the same for all methods."""
    return LongTailed.cut(
        images_of(cell.dataset, where),
        cell.imbalance,
        batch_size=preset.batch_size,
        validation_per_class=preset.validation_per_class,
        seed=cell.seed,
        device=where.device,
    )


def with_validation_images(data: LongTailed) -> LongTailed:
    """The same data with the validation images among the training images."""
    train, more = data.train, data.validation
    joined = replace(
        train, images=torch.cat([train.images, more.images]), targets=torch.cat([train.targets, more.targets])
    )
    counts = torch.bincount(joined.targets, minlength=len(data.classes)).tolist()
    return replace(data, train=joined, counts=tuple(counts))


def teacher_of(
    cell: Cell, preset: Preset, where: Where, milestones: Iterable[float] = (5 / 8, 3 / 4, 7 / 8)
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher of a data set, an imbalance and a seed; trained on the long-tailed images where it is not there."""
    cell = cell._replace(method=f"teacher-{preset.teacher}")
    trained = preset.of_teacher()
    data = data_of(cell, trained, where)
    model = network(cell, trained, where)
    result = fit(cell, trained, where, model, None, data, TEACHER, milestones)
    return model.eval().requires_grad_(False), result


def student_of(cell: Cell, preset: Preset, where: Where, method: Method) -> dict[str, Any]:
    """Train a student by a method; the record of it."""
    _, *suffix = cell.method.split("+")
    teacher, of_teacher = teacher_of(cell, preset, where)
    data = data_of(cell, preset, where)
    if "val" in suffix:
        data = with_validation_images(data)
    result = fit(cell, preset, where, network(cell, preset, where), teacher, data, method, DECAYS)
    return result | {"teacher": {key: of_teacher[key] for key in ("test", "validation", "seconds")}}


def network(cell: Cell, preset: Preset, where: Where) -> nn.Module:
    """The network, freshly drawn: the same for every method of a seed."""
    torch.manual_seed(cell.seed)
    images = images_of(cell.dataset, where)
    size = {"channels": images.train.shape[1], "size": images.train.shape[2]}
    model = build_model(preset.student, classes=len(images.classes), **size)
    return model.to(where.device, memory_format=torch.channels_last)


def optimizer_of(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The student's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=preset.lr, momentum=0.9, weight_decay=5e-4)


def settings_of(cell: Cell, preset: Preset, method: Method) -> dict[str, Any]:
    """All that decides a cell's numbers."""
    return {**cell._asdict(), **preset.settings(learned=isinstance(method, Learned))}


def fit(
    cell: Cell,
    preset: Preset,
    where: Where,
    model: nn.Module,
    teacher: nn.Module | None,
    data: LongTailed,
    method: Method,
    milestones: Iterable[float],
) -> dict[str, Any]:
    """Train, epoch by epoch, each followed by a checkpoint; the record of the run."""
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
    checkpoint = Checkpoint(where.work / f"{cell.name}.pt", settings_of(cell, preset, method), parts)
    history = checkpoint.load()
    groups = group_classes(data.counts)
    for epoch in range(len(history), preset.epochs):
        start, total = time.perf_counter(), torch.zeros((), device=where.device)
        model.train()
        for batch, loss in objective.epoch(epoch, data.train.epoch(epoch), data.validation.endless(epoch)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
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
        checkpoint.save(history)
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
