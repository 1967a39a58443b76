"""Exponential long-tailed training sets with a balanced validation set, from any labelled data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metakd.errors import MetaKDError


class Split(NamedTuple):
    """Positions of a long-tailed split's images in the full training set.

    Attributes:
        train: (N,) long tensor, long-tailed; classes in order.
        validation: (C * validation_per_class,) long tensor, balanced; disjoint from ``train``.
        counts: training images per class, in class order.

    Examples:
        >>> train, validation, counts = long_tailed_split(torch.arange(40) % 2, 4, validation_per_class=4)
        >>> len(train), len(validation), counts
        (20, 8, (16, 4))
    """

    train: Tensor
    validation: Tensor
    counts: tuple[int, ...]


def long_tail_counts(classes: int, n_max: int, imbalance: float) -> list[int]:
    """Training images per class of an exponential long tail.

    ``n_c = int(n_max * imbalance ** (-c / (C - 1)))`` for class ``c`` of ``C``: class 0 keeps ``n_max``
    images, the last one ``n_max / imbalance`` (Cui et al., *Class-balanced loss*, 2019).

    Args:
        classes: number of classes C.
        n_max: images of the largest class.
        imbalance: largest class over smallest class, at least 1.

    Returns:
        The counts, from the largest class to the smallest.

    Raises:
        MetaKDError: an argument is out of range, or the smallest class would have no image.

    Examples:
        >>> long_tail_counts(4, n_max=100, imbalance=8)
        [100, 50, 25, 12]
        >>> sum(long_tail_counts(10, n_max=4900, imbalance=50))  # CIFAR-10-LT
        13717
    """
    if classes < 1 or n_max < 1 or not imbalance >= 1:
        raise MetaKDError(
            f"a long tail needs at least one class, n_max >= 1 and imbalance >= 1, "
            f"but got classes={classes}, n_max={n_max}, imbalance={imbalance}"
        )
    counts = [int(n_max * imbalance ** (-c / max(classes - 1, 1))) for c in range(classes)]
    if counts[-1] < 1:
        raise MetaKDError(
            f"with n_max={n_max} and imbalance={imbalance:g} the smallest class has no image; "
            f"use an imbalance of at most {n_max}"
        )
    return counts


def largest_n_max(available: Sequence[int], imbalance: float) -> int:
    """The largest ``n_max`` for which every class has as many images as the long tail needs.

    Args:
        available: images per class that may be used for training, in class order.
        imbalance: largest class over smallest class, at least 1.

    Returns:
        At most ``available[0]``; 0 if there is no feasible long tail.

    Examples:
        >>> largest_n_max([100, 60, 20, 12], imbalance=8)  # class 2 has only 20 images: int(83 / 4)
        83
    """
    ratios = [imbalance ** (-c / max(len(available) - 1, 1)) for c in range(len(available))]
    n_max = available[0] if available else 0
    while n_max and any(int(n_max * r) > a for r, a in zip(ratios, available, strict=True)):
        n_max -= 1
    return n_max


def long_tailed_split(
    targets: Tensor,
    imbalance: float | None,
    *,
    validation_per_class: int,
    n_max: int | None = None,
    seed: int = 0,
) -> Split:
    """Cut a labelled training set to a long tail, after setting balanced validation images aside.

    Within each class the images are shuffled (depending on ``seed`` and the class alone). The first
    ``validation_per_class`` become validation images, the next ``n_c`` training images. ``n_max`` is
    counted after the validation images are taken, as in BiKD (arXiv 2605.17839). The order of the labels
    decides which classes are head and tail. With the same seed, the training images of a larger imbalance are a
    subset of those of a smaller one.

    Args:
        targets: (N,) class labels 0..C-1, every class present.
        imbalance: largest class over smallest class, or None to keep every image that is not a validation
            image (for naturally long-tailed data).
        validation_per_class: validation images per class.
        n_max: training images of the largest class; default: as many as the classes allow.
        seed: which images are chosen.

    Returns:
        Positions of training and validation images, and the training images per class.

    Raises:
        MetaKDError: a class has too few images, a label is missing, or the imbalance is below 1.

    Examples:
        >>> split = long_tailed_split(torch.arange(400) % 4, 8, validation_per_class=10)
        >>> split.counts, len(split.validation)
        ((90, 45, 22, 11), 40)
    """
    if imbalance is not None and not 1 <= imbalance < float("inf"):
        raise MetaKDError(
            f"imbalance is {imbalance}, but it is the largest class over the smallest, at least 1 "
            "(None, in the example --imbalance 0, keeps the class sizes)"
        )
    sizes = torch.bincount(targets).tolist()
    if 0 in sizes or not sizes:
        raise MetaKDError(f"class {sizes.index(0) if sizes else 0} has no image; labels must be 0..C-1, each present")
    available = [size - validation_per_class for size in sizes]
    smallest = min(range(len(sizes)), key=sizes.__getitem__)
    if available[smallest] < 1:
        raise MetaKDError(
            f"class {smallest} has {sizes[smallest]} images, too few for {validation_per_class} validation "
            f"images and at least one training image; ask for at most {sizes[smallest] - 1} validation "
            "images per class"
        )
    counts = available if imbalance is None else _cut(available, imbalance, n_max)
    train, validation = [], []
    for c, count in enumerate(counts):
        members = (targets == c).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + c)
        members = members[torch.randperm(len(members), generator=generator)]
        validation.append(members[:validation_per_class])
        train.append(members[validation_per_class : validation_per_class + count])
    return Split(torch.cat(train), torch.cat(validation), tuple(counts))


def _cut(available: list[int], imbalance: float, n_max: int | None) -> list[int]:
    feasible = largest_n_max(available, imbalance)
    counts = long_tail_counts(len(available), n_max or max(feasible, 1), imbalance)
    for c, (wanted, has) in enumerate(zip(counts, available, strict=True)):
        if wanted > has:
            raise MetaKDError(
                f"class {c} has {has} images left for training, but an imbalance of {imbalance:g} with "
                f"n_max={n_max} needs {wanted}; use n_max of at most {feasible}, or leave it out"
            )
    return counts
