"""One data set cut into training, meta, validation and test samples, and the samples of a setting."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.trust.features import features_of
from benchmarks.trust.presets import Preset
from metakd import Batch, MetaKDError
from metakd.longtail import Images, largest_n_max, load_images, long_tailed_split


class Task(NamedTuple):
    """Training samples of doubtful use; clean meta, validation and test samples.

    Attributes:
        train: all training samples; where there are groups, with columns `group` (source or annotator) and `cell`
            (group and label).
        meta: clean samples to judge by.
        validation: clean samples to choose by.
        test: clean samples to report.
        right: whether each training label, or each teacher's answer (a column each), is right; for the oracle alone.
        groups: number of groups; 0 where there are none.
        log_prior: logarithm of the shares of the labels, where the training set is long-tailed.
    """

    train: Batch
    meta: Batch
    validation: Batch
    test: Batch
    right: Tensor
    groups: int = 0
    log_prior: Tensor | None = None

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.test.targets.max()) + 1


class Parts(NamedTuple):
    """Samples and their true labels, as yet unharmed."""

    train: Batch
    meta: Batch
    validation: Batch
    test: Batch


@cache
def images_of(dataset: str, root: Path | None) -> Images:
    """The data set; CIFAR-10 may lie there as a folder of pictures."""
    if root is not None and (root / "train").is_dir():
        return load_images("folder", root)
    return load_images(dataset, root)


@cache
def pool(preset: Preset, root: Path | None, work: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the student sees of all training images, their labels, and the same of the test images.

    Features are kept in `work`; a convolutional student sees the images, each channel standardised.
    """
    if preset.student == "cnn":
        images = images_of(preset.dataset, root)
        mean, deviation = channels_of(images.train)
        seen, unseen = ((part - mean) / deviation for part in (images.train, images.test))
        return seen, images.train_targets, unseen, images.test_targets
    wanted = {"filters": preset.filters, "stride": preset.stride, "components": preset.components}
    path = work / ("-".join([preset.dataset, *map(str, wanted.values())]) + ".pt")
    if path.exists():
        return tuple(torch.load(path, weights_only=True))  # type: ignore[return-value]
    images = images_of(preset.dataset, root)
    train, test = features_of(images, **wanted)
    found = (train, images.train_targets, test, images.test_targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def channels_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, `(C, 1, 1)` each."""
    values = images.transpose(0, 1).flatten(1).float()
    return values.mean(1)[:, None, None], values.std(1)[:, None, None]


def parts_of(preset: Preset, meta: int, seed: int, root: Path | None, work: Path, tail: float | None = None) -> Parts:
    """Cut the data set; with the same seed the same images are in the same part, whatever the meta set's size.

    Args:
        preset: sizes.
        meta: images of each class in the meta set.
        seed: which images.
        root: the pictures.
        work: where features are kept.
        tail: imbalance of the training set; None for a balanced one.

    Raises:
        MetaKDError: fewer images were set aside than the meta set asks for.
    """
    if meta > preset.largest_meta:
        raise MetaKDError(f"a meta set of {meta} images a class is asked for, but {preset.largest_meta} are set aside")
    x, y, x_test, y_test = pool(preset, root, work)
    aside = preset.largest_meta + preset.validation
    n_max = None
    if tail is not None:
        n_max = min(4 * preset.per_class, largest_n_max((torch.bincount(y) - aside).tolist(), tail))
    split = long_tailed_split(y, 1.0 if tail is None else tail, validation_per_class=aside, n_max=n_max, seed=seed)
    classes = len(split.counts)
    held = split.validation.view(classes, aside)
    train = split.train
    if tail is None:
        train = torch.cat([own[: preset.per_class] for own in train.split(list(split.counts))])

    def batch(rows: Tensor) -> Batch:
        return Batch(x[rows.flatten()], y[rows.flatten()])

    whole = batch(train)
    return Parts(
        whole._replace(index=torch.arange(len(train))),
        batch(held[:, :meta]),
        batch(held[:, preset.largest_meta :]),
        Batch(x_test, y_test),
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some samples of a batch in memory."""
    return Batch(
        batch.inputs[rows],
        batch.targets[rows],
        None if batch.teacher is None else [outputs[rows] for outputs in batch.teacher],
        None if batch.index is None else batch.index[rows],
        columns=None if batch.columns is None else {name: values[rows] for name, values in batch.columns.items()},
    )


def endless(whole: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Shuffled batches without end; a set smaller than a batch comes as a whole."""
    generator = torch.Generator().manual_seed(seed)
    count = len(whole.targets)
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            if len(rows) == min(size, count):
                yield rows_of(whole, rows)
