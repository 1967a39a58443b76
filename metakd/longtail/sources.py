"""Training images from several sources, of which some mislabel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.longtail.batches import Batches, LongTailed

KINDS = ("right", "half wrong", "always wrong")
"""What a source's labels may be."""


@dataclass(frozen=True)
class Sourced:
    """A long-tailed training set whose images come from sources, and clean images to judge and to choose by.

    Attributes:
        data: its training batches name each image's source, `(inputs, targets, index, {"source": ids})`; its validation
            images are the meta images.
        choice: clean images to choose settings by, neither meta nor test images.
        kinds: what each source's labels are, one of `KINDS`; for controls and figures alone.
        counts: training images of each source.
        right: the share of the training labels that are right.

    Examples:
        >>> from metakd.longtail import load_images
        >>> found = from_sources(LongTailed.cut(load_images("digits"), 5, validation_per_class=20), 10)
        >>> found.of_kind("right"), len(found.data.validation.targets), len(found.choice.targets)
        ([0, 1, 2], 100, 100)
    """

    data: LongTailed
    choice: Batches
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    right: float

    def of_kind(self, kind: str) -> list[int]:
        """The numbers of the sources of a kind."""
        return [source for source, its in enumerate(self.kinds) if its == kind]

    def describe(self) -> str:
        """The sources in one line."""
        kinds = ", ".join(f"{len(self.of_kind(kind))} {kind}" for kind in KINDS)
        return f"{len(self.kinds)} sources ({kinds}); {100 * self.right:.0f} % of the training labels are right"


def from_sources(data: LongTailed, sources: int, *, seed: int = 0) -> Sourced:
    """Give every training image a source, mislabel some sources, and set half of the validation images aside.

    Three in ten sources label right, as many are wrong half of the time, at random, and the rest always name the next
    class.

    Args:
        data: with right labels, and an even number of validation images of each class.
        sources: their number, at least 4.
        seed: of sources and labels.

    Returns:
        The data with sources.

    Raises:
        MetaKDError: there are fewer than four sources, or too few validation images.

    Examples:
        >>> from metakd.longtail import load_images
        >>> found = from_sources(LongTailed.cut(load_images("digits"), 5, validation_per_class=20), 10)
        >>> found.describe()
        '10 sources (3 right, 3 half wrong, 4 always wrong); 46 % of the training labels are right'
        >>> next(found.data.train.epoch(0))[3]["source"].shape
        torch.Size([100])
    """
    classes, targets, held = len(data.classes), data.train.targets, data.validation
    per_class = len(held.targets) // classes
    if sources < 4 or per_class < 2:
        raise MetaKDError(
            f"got {sources} sources and {per_class} validation images a class; some sources are right, some half wrong "
            "and some always wrong, which takes at least 4, and the validation images are halved: at least 2 a class"
        )
    good = max(round(0.3 * sources), 1)
    kinds = tuple(KINDS[0 if s < good else 1 if s < 2 * good else 2] for s in range(sources))
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(sources, targets.shape, generator=generator)
    other = (targets.cpu() + torch.randint(1, classes, targets.shape, generator=generator)) % classes
    wrong = (torch.rand(targets.shape, generator=generator) < 0.5) & (source < 2 * good)
    labels = torch.where(wrong, other, targets.cpu())
    labels = torch.where(source < good, targets.cpu(), labels)
    labels = torch.where(source < 2 * good, labels, (targets.cpu() + 1) % classes).to(targets.device)

    rows = torch.arange(classes * per_class).view(classes, per_class)  # validation images lie class by class
    meta, choice = (part.flatten() for part in rows.tensor_split(2, dim=1))
    train = replace(data.train, targets=labels, columns={"source": source.to(targets.device)})
    return Sourced(
        replace(data, train=train, validation=_part(held, meta)),
        replace(_part(held, choice), stream=3),
        kinds,
        tuple(torch.bincount(source, minlength=sources).tolist()),
        float((labels == targets).float().mean()),
    )


def _part(batches: Batches, rows: Tensor) -> Batches:
    rows = rows.to(batches.targets.device)
    return replace(batches, images=batches.images[rows], targets=batches.targets[rows])


class Mixture(NamedTuple):
    """Fixed weights of the terms for each source, and for meta images among the training images.

    Attributes:
        by_source: (S, M) weights; (1, M) for data without sources.
        meta: (M,) weights of the images whose column `from_meta` is 1 (`metakd.meta_in_training`); None without them.

    Examples:
        >>> batch = Batch(None, columns={"source": torch.tensor([1, 0, -1]), "from_meta": torch.tensor([0, 0, 1])})
        >>> Mixture(torch.tensor([[1.0, 0.0], [0.2, 0.8]]), torch.tensor([1.0, 0.0]))(batch)
        tensor([[0.2000, 0.8000],
                [1.0000, 0.0000],
                [1.0000, 0.0000]])
    """

    by_source: Tensor
    meta: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """(B, M) the weights of a batch; (1, M) without sources."""
        columns, weights = batch.columns or {}, self.by_source
        if "source" in columns:
            source = columns["source"]
            weights = weights.to(source.device)[source.clamp(min=0)]
        if self.meta is not None:
            from_meta = columns["from_meta"].unsqueeze(1) == 1
            weights = torch.where(from_meta, self.meta.to(from_meta.device), weights.to(from_meta.device))
        return weights
