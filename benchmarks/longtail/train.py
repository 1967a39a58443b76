"""One cell: its data, its teacher, its student, and how well they do."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.longtail import mosaics, teachers
from benchmarks.longtail.fit import Where, fit, optimizer_of
from benchmarks.longtail.fixed import Fixed
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.methods import Method
from benchmarks.longtail.presets import DECAYS, Preset
from benchmarks.longtail.steps import InHalf
from metakd import terms
from metakd.longtail import Batches, Images, LongTailed, build_model, evaluate, group_classes, load_images

__all__ = ["Cell", "Where", "data_of", "network", "optimizer_of", "settings_of", "student_of", "teacher_of"]

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


@cache
def images_of(dataset: str, where: Where) -> Images:
    """The whole data set."""
    if where.data_root is not None and mosaics.there(where.data_root / dataset):
        return mosaics.read(where.data_root / dataset)
    if where.image_folder and where.data_root is not None:
        images = load_images("folder", where.data_root / dataset)
    else:
        images = load_images(dataset, where.data_root)
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(dataset, dataset)
    return replace(images, title=title, name=title) if where.image_folder else images


def data_of(cell: Cell, preset: Preset, where: Where) -> LongTailed:
    """The cell's long tail; the same for all methods.

    For a choice among methods, images that are neither training nor validation images are in the test images' place.
    """
    meta, choice = preset.validation_per_class, preset.choice_per_class
    data = LongTailed.cut(
        images_of(cell.dataset, where),
        cell.imbalance,
        batch_size=preset.batch_size,
        validation_per_class=None if meta is None else meta + choice,
        seed=cell.seed,
        device=where.device,
    )
    if not choice:
        return data
    rows = torch.arange(len(data.validation.targets)).view(len(data.classes), -1)  # they lie class by class
    parts = (_part(data.validation, some.flatten()) for some in (rows[:, :meta], rows[:, meta:]))
    return replace(data, validation=next(parts), test=next(parts))


def with_validation_images(data: LongTailed, *, half: bool = False) -> LongTailed:
    """The same data with the validation images among the training images, or half of them, which leaves the others."""
    train, more = data.train, data.validation
    if half:
        rows = torch.arange(len(more.targets)).view(len(data.classes), -1)
        first, second = rows.tensor_split(2, dim=1)
        data, more = replace(data, validation=_part(more, second.flatten())), _part(more, first.flatten())
    joined = replace(
        train, images=torch.cat([train.images, more.images]), targets=torch.cat([train.targets, more.targets])
    )
    counts = torch.bincount(joined.targets, minlength=len(data.classes)).tolist()
    return replace(data, train=joined, counts=tuple(counts))


def _part(batches: Batches, rows: Tensor) -> Batches:
    rows = rows.to(batches.targets.device)
    return replace(batches, images=batches.images[rows], targets=batches.targets[rows])


def teacher_of(
    cell: Cell, preset: Preset, where: Where, milestones: Iterable[float] = (5 / 8, 3 / 4, 7 / 8)
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher of a data set, an imbalance and a seed; trained on the long-tailed images where it is not there."""
    cell = cell._replace(method=f"teacher-{preset.teacher}")
    taught = preset.of_teacher()
    model = network(cell, taught, where)
    path = where.teachers and teachers.path_of(where.teachers, cell.name)
    result = teachers.load(model, path) if path else None
    if result is None:
        data = data_of(cell, taught, where)
        result = fit(
            cell.name, settings_of(cell, taught, TEACHER), taught, where, model, None, data, TEACHER, milestones
        )
        if path:
            model.load_state_dict(teachers.unpacked(teachers.packed(model.state_dict())))
            groups = group_classes(data.counts)
            rounded = {
                part: evaluate(model, getattr(data, part).plain(), groups)._asdict() for part in ("test", "validation")
            }
            result = {**result, **rounded, "before_rounding": result["test"]["overall"]}
            teachers.save(model, result, path)
            where.checkpoint_of(cell.name).unlink(missing_ok=True)
    return model.eval().requires_grad_(False), result


def student_of(cell: Cell, preset: Preset, where: Where, method: Method) -> dict[str, Any]:
    """Train a student by a method; the record of it."""
    _, *suffix = cell.method.split("+")
    teacher, of_teacher = teacher_of(cell, preset, where)
    if where.fast:
        teacher = InHalf(teacher).eval()
    data = data_of(cell, preset, where)
    if {"val", "half"} & {*suffix}:
        data = with_validation_images(data, half="half" in suffix)
    result = trained(cell, preset, where, teacher, data, method, DECAYS)
    return result | {"teacher": {key: of_teacher[key] for key in ("test", "validation", "seconds")}}


def trained(
    cell: Cell,
    preset: Preset,
    where: Where,
    teacher: nn.Module | None,
    data: LongTailed,
    method: Method,
    milestones: Iterable[float],
) -> dict[str, Any]:
    """Train the cell's network on given data; see `fit`."""
    settings, model = settings_of(cell, preset, method), network(cell, preset, where)
    return fit(cell.name, settings, preset, where, model, teacher, data, method, milestones)


def network(cell: Cell, preset: Preset, where: Where) -> nn.Module:
    """The network, freshly drawn: the same for every method of a seed."""
    torch.manual_seed(cell.seed)
    images = images_of(cell.dataset, where)
    size = {"channels": images.train.shape[1], "size": images.train.shape[2]}
    model = build_model(preset.student, classes=len(images.classes), **size)
    return model.to(where.device, memory_format=torch.channels_last)


def settings_of(cell: Cell, preset: Preset, method: Method) -> dict[str, Any]:
    """All that decides a cell's numbers."""
    return {**cell._asdict(), **preset.settings(learned=isinstance(method, Learned))}
