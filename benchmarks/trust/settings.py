"""The settings: what is unreliable about the training samples, and how much of it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.trust.data import Parts, Task, endless, parts_of
from benchmarks.trust.presets import Preset
from metakd import Batch

SOURCES = (*[1.0] * 6, *[0.5] * 6, *[0.0] * 8)
"""Each source's share of labels that are left alone; the others become another class."""

KNOWN = tuple(2 + k % 7 for k in range(20))
"""How many classes each annotator can tell apart; it guesses among the others."""

PAIRS = (8, 9, 0, 5, 7, 3, 4, 4, 0, 1)
"""What an image of each of CIFAR-10's classes is mistaken for in pair noise: a class that resembles it."""

BAD = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7, 8), (6, 7, 8, 9, 0))
"""The classes about which each of the teachers is wrong: it takes each for the next one of them."""


class Where(NamedTuple):
    """What does not decide numbers: where the pictures are, and where features are kept."""

    root: Path | None
    work: Path


def others(y: Tensor, generator: torch.Generator, classes: int = 10) -> Tensor:
    """Another class for each label, all alike."""
    return (y + torch.randint(1, classes, y.shape, generator=generator)) % classes


def flipped(y: Tensor, share: Tensor | float, generator: torch.Generator, to: Tensor | None = None) -> Tensor:
    """Labels of which a share, one for all or one for each, is another class: any, or that which `to` says."""
    wrong = torch.rand(y.shape, generator=generator) < share
    return torch.where(wrong, others(y, generator) if to is None else to[y], y)


def _of(parts: Parts, labels: Tensor, group: Tensor | None = None, groups: int = 0) -> Task:
    columns = None if group is None else {"group": group, "cell": 10 * group + labels}
    train = parts.train._replace(targets=labels, columns=columns)
    return Task(train, parts.meta, parts.validation, parts.test, labels == parts.train.targets, groups)


def sources(parts: Parts, generator: torch.Generator) -> Task:
    """20 sources: 6 clean, 6 of whose labels half are another class, 8 whose labels are always another class."""
    y = parts.train.targets
    source = torch.randint(len(SOURCES), y.shape, generator=generator)
    return _of(parts, flipped(y, 1 - torch.tensor(SOURCES)[source], generator), source, len(SOURCES))


def annotators(parts: Parts, generator: torch.Generator) -> Task:
    """One label an image, from one of 20 annotators, who know 2 to 8 classes each and guess among those they do not."""
    y = parts.train.targets
    annotator = torch.randint(len(KNOWN), y.shape, generator=generator)
    labels = y.clone()
    for a, known in enumerate(KNOWN):
        order = torch.randperm(10, generator=generator)
        unknown = order[known:]
        guessed = unknown[torch.randint(len(unknown), y.shape, generator=generator)]
        labels = torch.where((annotator == a) & (y[:, None] == unknown).any(1), guessed, labels)
    return _of(parts, labels, annotator, len(KNOWN))


def symmetric(share: float) -> Callable[[Parts, torch.Generator], Task]:
    """A share of the labels is another class, all others alike."""
    return lambda parts, generator: _of(parts, flipped(parts.train.targets, share, generator))


def pair(share: float) -> Callable[[Parts, torch.Generator], Task]:
    """A share of the labels is one other class, the most similar one."""

    def harm(parts: Parts, generator: torch.Generator) -> Task:
        y = parts.train.targets
        to = (torch.arange(10) + 1) % 10 if parts.train.inputs.shape[1] == 64 else torch.tensor(PAIRS)
        return _of(parts, flipped(y, share, generator, to))

    return harm


def long_tail(parts: Parts, generator: torch.Generator) -> Task:
    """40 % of the labels are another class, and the classes' sizes fall by a factor of 50."""
    task = _of(parts, flipped(parts.train.targets, 0.4, generator))
    counts = torch.bincount(task.train.targets, minlength=10).float()
    return task._replace(log_prior=(counts / counts.sum()).log())


def teachers(parts: Parts, generator: torch.Generator) -> Task:
    """No labels; three teachers, each of whom takes each of 5 or 6 classes for another one of them."""
    y = parts.train.targets
    outputs: list[list[Tensor]] = [[], []]
    right = []
    for number, bad in enumerate(BAD):
        to = torch.arange(10)
        to[list(bad)] = torch.tensor([*bad[1:], bad[0]])
        network = taught(parts.train._replace(targets=to[y]), seed=number)
        for found, part in zip(outputs, (parts.train, parts.meta), strict=True):
            found.append(network(part.inputs).detach())
        right.append(to[y] == y)
    train = parts.train._replace(targets=torch.zeros_like(y), teacher=outputs[0])
    meta = parts.meta._replace(teacher=outputs[1])
    return Task(train, meta, parts.validation, parts.test, torch.stack(right, 1))


def taught(train: Batch, seed: int, steps: int = 300) -> nn.Module:
    """A teacher: a small network that was trained on these labels."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        network = nn.Sequential(nn.Linear(train.inputs.shape[1], 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    for batch, _ in zip(endless(train, 128, seed), range(steps), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.inputs), batch.targets).backward()
        optimizer.step()
    return network


SETTINGS: dict[str, Callable[[Parts, torch.Generator], Task]] = {
    "sources": sources,
    "annotators": annotators,
    "pair 20 %": pair(0.2),
    "pair 40 %": pair(0.4),
    "symmetric 20 %": symmetric(0.2),
    "symmetric 40 %": symmetric(0.4),
    "long tail": long_tail,
    "teachers": teachers,
}


@cache
def task_of(setting: str, preset: Preset, meta: int, seed: int, where: Where) -> Task:
    """The samples of a cell."""
    parts = parts_of(preset, meta, seed, *where, tail=50.0 if setting == "long tail" else None)
    return SETTINGS[setting](parts, torch.Generator().manual_seed(seed))
