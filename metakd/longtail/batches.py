"""Batches of images in memory, shuffled and augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.longtail.augment import Augment, crop, draw_crops
from metakd.longtail.data import Images
from metakd.longtail.splits import Split, long_tailed_split


@dataclass(frozen=True)
class Batches:
    """A loader of images in memory, whose order and augmentation depend on (seed, epoch) alone.

    So a run resumed at an epoch sees the same batches as an uninterrupted one. They come on the images' device, index
    included; an epoch's random numbers go there in one copy.

    Attributes:
        images: (N, C, H, W) raw images.
        targets: (N,) labels.
        augment: turns raw images into the network's input.
        batch_size: images per batch; an incomplete last batch is dropped unless it is the only one.
        seed: of the order and of the augmentation.
        stream: distinguishes loaders of the same seed.
        columns: name -> (N,) integers, such as each image's source; if there are any, they are the last part of a
            batch, `(inputs, targets, index, {name: integers})`.

    Examples:
        >>> from metakd.longtail import load_images
        >>> train = LongTailed.cut(load_images("digits"), 20, batch_size=32, validation_per_class=10).train
        >>> inputs, targets, index = next(train.epoch(0))
        >>> len(train), inputs.shape, torch.equal(train.targets[index], targets)
        (11, torch.Size([32, 1, 8, 8]), True)
    """

    images: Tensor
    targets: Tensor
    augment: Augment
    batch_size: int
    seed: int = 0
    stream: int = 0
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(len(self.targets) // self.batch_size, 1)

    def epoch(self, epoch: int) -> Iterator[tuple[Any, ...]]:
        """The batches (inputs, targets, index) of one epoch, every image at most once; with columns, these as well."""
        yield from self._once(self._generator(epoch))

    def endless(self, epoch: int) -> Iterator[tuple[Any, ...]]:
        """Batches without end for one epoch of another loader, reshuffled after every pass."""
        generator = self._generator(epoch)
        while True:
            yield from self._once(generator)

    def plain(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All images in order, normalised but not augmented, for evaluation."""
        for index in torch.arange(len(self.targets)).split(500):
            yield self.augment.normalise(self.images[index]), self.targets[index], index

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000 + self.stream) * 1_000_003 + epoch)

    def _once(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        # All random numbers of a pass, drawn on the CPU, the same for every device, and copied there at once.
        order = torch.randperm(len(self.targets), generator=generator)
        parts = order[: len(self) * self.batch_size].split(self.batch_size)
        padding, flip = self.augment.padding, self.augment.flip
        moves = bool(padding or flip)
        drawn = [draw_crops(self.images[: len(part)], padding, flip, generator) for part in parts if moves]
        crops = _moved(torch.stack(drawn), self.images.device) if moves else None
        for i, index in enumerate(_moved(order, self.images.device).split(self.batch_size)[: len(parts)]):
            images = self.images[index]
            if crops is not None:
                images = crop(images, crops[i], padding)
            item = self.augment.normalise(images), self.targets[index], index
            yield (*item, {name: of[index] for name, of in self.columns.items()}) if self.columns else item


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU from pinned memory, for which the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set, a small balanced validation set and the test set, ready to train on.

    Attributes:
        train: the long-tailed training images.
        validation: balanced images, disjoint from the training images; the meta batches of a bilevel method.
        test: the test images.
        counts: training images per class.
        classes: class names.
        title: the data in a word or two.
        name: the data in words.

    Examples:
        >>> from metakd.longtail import load_images
        >>> data = LongTailed.cut(load_images("digits"), 20, batch_size=32, validation_per_class=10)
        >>> for batch, meta in zip(data.train.epoch(0), data.validation.endless(0)):
        ...     pass  # a step on (inputs, targets, index)
        >>> len(meta[1])
        32
    """

    train: Batches
    validation: Batches
    test: Batches
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    title: str
    name: str

    @classmethod
    def cut(
        cls,
        images: Images,
        imbalance: float | None,
        *,
        batch_size: int = 100,
        validation_per_class: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> LongTailed:
        """Cut a data set to a long tail.

        Args:
            images: the whole data set.
            imbalance: largest class over smallest class; None keeps the data's own class sizes.
            batch_size: of training and validation batches.
            validation_per_class: default: 1000 / C images per class, as in the CIFAR-LT protocol, but at most
                three quarters of the smallest class.
            seed: of the split, the batches' order and the augmentation.
            device: where the batches go.

        Raises:
            MetaKDError: a class has too few images.

        Examples:
            >>> from metakd.longtail import load_images
            >>> data = LongTailed.cut(load_images("digits"), imbalance=20, validation_per_class=10)
            >>> data.counts
            (108, 77, 55, 39, 28, 20, 14, 10, 7, 5)
        """
        if validation_per_class is None:
            smallest = int(torch.bincount(images.train_targets).min())
            validation_per_class = max(1, min(1000 // len(images.classes), smallest * 3 // 4))
        split: Split = long_tailed_split(
            images.train_targets, imbalance, validation_per_class=validation_per_class, seed=seed
        )
        if len(split.train) < batch_size:
            raise MetaKDError(
                f"the long-tailed training set has {len(split.train)} images, less than one batch of "
                f"{batch_size}; use a smaller batch size"
            )
        augment = Augment.fitted(
            images.train[split.train], padding=images.padding, flip=images.flip, scale=images.scale
        )

        def batches(x: Tensor, y: Tensor, size: int, stream: int) -> Batches:
            return Batches(x.to(device), y.to(device), augment, size, seed, stream)

        def part(index: Tensor, stream: int) -> Batches:
            return batches(images.train[index], images.train_targets[index], batch_size, stream)

        return cls(
            part(split.train, 0),
            part(split.validation, 1),
            batches(images.test, images.test_targets, batch_size, 2),
            split.counts,
            images.classes,
            images.title,
            images.name,
        )

    def describe(self) -> str:
        """The data in one line.

        Examples:
            >>> from metakd.longtail import load_images
            >>> data = LongTailed.cut(load_images("digits"), 20, validation_per_class=10)
            >>> data.describe().split(": ")[1].split(", ")
            ['363 long-tailed training images (108 to 5 a class)', '100 balanced validation images',
             '600 test images']
        """
        return (
            f"{self.name}: {len(self.train.targets)} long-tailed training images ({max(self.counts)} to "
            f"{min(self.counts)} a class), {len(self.validation.targets)} balanced validation images, "
            f"{len(self.test.targets)} test images"
        )
