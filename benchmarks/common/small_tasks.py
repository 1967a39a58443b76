"""Digits whose labels cannot all be trusted, and long-tailed ones: small tasks for tables of weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import Batch, weighting
from metakd.longtail import load_images, long_tailed_split
from metakd.terms import CrossEntropy, Term

HELD, BATCH = 10, 50
"""Images of each class in the meta set, and again in the validation set; the batch size."""


class Task(NamedTuple):
    """Training images of doubtful use, clean meta, validation and test images, and a table of weights.

    Attributes:
        train: all training images, with index and columns.
        meta: clean images to judge by.
        validation: clean images to choose by.
        test: clean images to report.
        terms: of the training loss.
        table: output -> an untrained weight model; its other arguments are the defaults.
        trusted: whether each training image's label is right; for controls alone.
    """

    train: Batch
    meta: Batch
    validation: Batch
    test: Batch
    terms: Mapping[str, Term]
    table: Callable[..., nn.Module]
    trusted: Tensor


class _Digits(NamedTuple):
    x: Tensor
    y: Tensor
    meta: Batch
    validation: Batch
    test: Batch


def _digits(seed: int, imbalance: float | None = None) -> tuple[_Digits, torch.Generator]:
    """The digits of a seed, and a generator for what is done to their labels."""
    images = load_images("digits")
    split = long_tailed_split(images.train_targets, imbalance, validation_per_class=2 * HELD, seed=seed)

    def batch(x: Tensor, y: Tensor) -> Batch:
        return Batch(x.float().flatten(1) / 16, y)

    train = batch(images.train[split.train], images.train_targets[split.train])
    held = split.validation.view(len(images.classes), 2, HELD).unbind(1)  # they lie class by class
    meta, validation = (batch(images.train[i.flatten()], images.train_targets[i.flatten()]) for i in held)
    found = _Digits(train.inputs, train.targets, meta, validation, batch(images.test, images.test_targets))
    return found, torch.Generator().manual_seed(seed)


def _others(y: Tensor, generator: torch.Generator) -> Tensor:
    """Another class for each label."""
    return (y + torch.randint(1, 10, y.shape, generator=generator)) % 10


def _flipped(y: Tensor, share: Tensor | float, generator: torch.Generator) -> Tensor:
    """Labels of which a share, one for all or one for each, is another class."""
    return torch.where(torch.rand(y.shape, generator=generator) < share, _others(y, generator), y)


def _one_term(d: _Digits, labels: Tensor, table: Callable[..., nn.Module], **columns: Tensor) -> Task:
    train = Batch(d.x, labels, index=torch.arange(len(labels)), columns=columns or None)
    return Task(train, d.meta, d.validation, d.test, {"label": CrossEntropy()}, table, labels == d.y)


def sources(seed: int) -> Task:
    """Twelve sources: three right, four wrong half of the time, five that always say the next class; a weight each."""
    d, generator = _digits(seed)
    source = torch.randint(12, d.y.shape, generator=generator)
    labels = _flipped(d.y, 0.5 * ((source > 2) & (source < 7)), generator)
    labels = torch.where(source < 7, labels, (d.y + 1) % 10)
    return _one_term(d, labels, lambda **o: weighting.GroupTable("source", 12, 1, **o), source=source)


def noise(seed: int) -> Task:
    """40 % of the labels are another class; one weight for each image."""
    d, generator = _digits(seed)
    return _one_term(d, _flipped(d.y, 0.4, generator), lambda **o: weighting.SampleTable(len(d.y), 1, **o))


def long_tail(seed: int) -> Task:
    """Class sizes that fall by a factor of 50; one weight for each class."""
    d, _ = _digits(seed, 50.0)
    return _one_term(d, d.y, lambda **o: weighting.ClassTable(10, 1, **o))


class _Annotator(NamedTuple):
    """Cross-entropy with one annotator's labels, a column of the targets."""

    number: int

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets[:, self.number], reduction="none")


def annotators(seed: int) -> Task:
    """Four labels for each image, of which 5, 40, 80 and 100 % are another class; one weight for each annotator."""
    d, generator = _digits(seed)
    labels = torch.stack([_flipped(d.y, share, generator) for share in (0.05, 0.4, 0.8, 1.0)], dim=1)
    terms: dict[str, Term] = {f"annotator {k}": _Annotator(k) for k in range(4)}
    train = Batch(d.x, labels, index=torch.arange(len(labels)))
    return Task(
        train, d.meta, d.validation, d.test, terms, lambda **o: weighting.TermScalars(4, **o), labels[:, 0] == d.y
    )


TASKS: dict[str, Callable[[int], Task]] = {
    "sources": sources,
    "noise": noise,
    "long tail": long_tail,
    "annotators": annotators,
}


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some samples of a batch in memory."""
    columns = None if batch.columns is None else {name: values[rows] for name, values in batch.columns.items()}
    index = None if batch.index is None else batch.index[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], index=index, columns=columns)


def batches(whole: Batch, generator: torch.Generator, size: int = BATCH) -> Iterator[Batch]:
    """Shuffled batches of one epoch; an incomplete last one is left out."""
    order = torch.randperm(len(whole.targets), generator=generator)
    for rows in order.split(size):
        if len(rows) == size or len(order) < size:
            yield rows_of(whole, rows)


def endless(whole: Batch, generator: torch.Generator, size: int = BATCH) -> Iterator[Batch]:
    """Shuffled batches without end."""
    while True:
        yield from batches(whole, generator, size)


def student(seed: int, activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A small network and its optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """In percent."""
    return 100 * float((model(batch.inputs).argmax(1) == batch.targets).float().mean())
