"""The digits with meta sets of several sizes: what a student makes of them, and how noisy their hypergradients are."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.digits import DIGITS, MILESTONES
from benchmarks.longtail import methods
from benchmarks.longtail.fixed import Fixed
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.presets import Preset
from benchmarks.longtail.setting import Setting
from benchmarks.longtail.train import (
    Cell,
    Where,
    data_of,
    network,
    optimizer_of,
    teacher_of,
    trained,
    with_validation_images,
)
from metakd import BilevelLossBalancer
from metakd.longtail import LongTailed

NAMES = ("kd", "bskd", "bikd", "bikd-k5")

PAIRS, BATCHES = 6, 5
"""Pairs of disjoint meta sets for each size; training batches whose hypergradients are compared and averaged."""


def preset_of(cell: Mapping[str, Any]) -> Preset:
    """The digits' settings, with so many images a class held back as the largest meta set has."""
    return replace(
        DIGITS,
        epochs=cell["epochs"],
        teacher_epochs=min(cell["epochs"], DIGITS.teacher_epochs),
        validation_per_class=max(cell["sizes"]),
        evaluate_every=cell["epochs"],
    )


def with_meta_set(data: LongTailed, size: int) -> LongTailed:
    """The same training and test images, with a meta set of the first `size` images of each class held back."""
    held, classes = data.validation, len(data.classes)
    chosen = torch.arange(len(held.targets)).view(classes, -1)[:, :size].flatten()  # they lie class by class
    return replace(data, validation=replace(held, images=held.images[chosen], targets=held.targets[chosen]))


def accuracy_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy of students of one teacher and one start, for every method and size of the meta set.

    Learned weights take the meta set as such; without one they stay as they start. Under fixed weights its images are
    training images.

    Returns:
        accuracy: name -> percent without a meta set, then for each of the sizes.
    """
    preset, found = preset_of(cell), {}
    with tempfile.TemporaryDirectory() as work:
        where = Where(None, False, Path(work), "cpu")
        at = Cell("digits", 20.0, "teacher", cell["seed"])
        teacher, _ = teacher_of(at, preset, where, MILESTONES)
        data = data_of(at, preset, where)

        def accuracy(name: str, size: int) -> float:
            method, given = methods.find(name), data
            if size:
                given = with_meta_set(data, size)
                given = with_validation_images(given) if isinstance(method, Fixed) else given
            elif isinstance(method, Learned):
                method = methods.find(f"{name}+frozen")
            one = at._replace(method=f"{name}-{size}")
            return float(trained(one, preset, where, teacher, given, method, MILESTONES)["test"]["overall"])

        for name in cell["methods"]:
            found[name] = [accuracy(name, size) for size in (0, *cell["sizes"])]
    return {"accuracy": found}


def noise_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines between BiKD's hypergradients by disjoint meta sets, at three points of a training with the largest one.

    The meta sets of the comparison are drawn from the test images: nothing is trained on them, and there are more.

    Returns:
        noise: epochs trained -> "other set", "other batch", "other set, mean" -> a cosine for each of the sizes.
    """
    preset, found = preset_of(cell), {}
    with tempfile.TemporaryDirectory() as work:
        where = Where(None, False, Path(work), "cpu")
        at = Cell("digits", 20.0, "bikd", cell["seed"])
        teacher, _ = teacher_of(at, preset, where, MILESTONES)
        data, student = data_of(at, preset, where), network(at, preset, where)
    optimizer = optimizer_of(student, preset)
    objective = methods.LEARNED["bikd"](Setting(student, teacher, optimizer, data.counts, preset))
    for epoch in range(preset.epochs + 1):
        if epoch in points(preset.epochs):
            found[str(epoch)] = cosines(objective.balancer, data, cell["sizes"], epoch)
        if epoch < preset.epochs:
            for _, loss in objective.epoch(epoch, data.train.epoch(epoch), data.validation.endless(epoch)):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {"noise": found}


def points(epochs: int) -> tuple[int, ...]:
    """When hypergradients are compared: before training, after a tenth of it, at its end."""
    return (0, max(epochs // 10, 1), epochs)


def cosines(balancer: BilevelLossBalancer, data: LongTailed, sizes: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Mean cosines for each size, of hypergradients in the weight model as it is; nothing moves."""
    generator = torch.Generator().manual_seed(seed)
    batches = [batch for batch, _ in zip(data.train.endless(seed), range(BATCHES), strict=False)]
    found: dict[str, list[float]] = {"other set": [], "other batch": [], "other set, mean": []}
    for size in sizes:
        pairs = [disjoint(data, size, generator) for _ in range(PAIRS)]
        h = torch.stack([torch.stack([hypergradients(balancer, batches, meta) for meta in pair]) for pair in pairs])
        unit = torch.nn.functional.normalize(h, dim=-1)  # (pairs, 2, batches, parameters)
        between = torch.einsum("psbi,psci->psbc", unit, unit)
        others = ~torch.eye(BATCHES, dtype=torch.bool)
        found["other set"].append(float((unit[:, 0] * unit[:, 1]).sum(-1).mean()))
        found["other batch"].append(float(between[..., others].mean()))
        mean = torch.nn.functional.normalize(h.mean(2), dim=-1)
        found["other set, mean"].append(float((mean[:, 0] * mean[:, 1]).sum(-1).mean()))
    return found


def disjoint(data: LongTailed, size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Two meta sets of so many test images a class that share none."""
    images, targets = data.test.images, data.test.targets
    chosen: list[list[Tensor]] = [[], []]
    for c in range(len(data.classes)):
        members = (targets == c).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        chosen[0].append(members[:size])
        chosen[1].append(members[size : 2 * size])
    return [(data.test.augment.normalise(images[i]), targets[i]) for i in map(torch.cat, chosen)]


def hypergradients(balancer: BilevelLossBalancer, batches: Sequence[Any], meta: tuple[Tensor, Tensor]) -> Tensor:
    """(batches, parameters): one hypergradient a training batch; student and weight model stay as they are."""
    rows = []
    for batch in batches:
        with balancer.problem([batch], meta) as problem:
            gradient = balancer.estimator(problem).gradient
        rows.append(torch.cat([g.flatten() for g in gradient.values()]).double())
    return torch.stack(rows)


METHODS: dict[str, Any] = {}
CELLS = {"accuracy": accuracy_cell, "noise": noise_cell}
