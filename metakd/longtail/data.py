"""Image classification data sets, loaded into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.longtail._torchvision import import_torchvision

DATASETS = ("digits", "cifar10", "cifar100", "folder")
"""What `load_images` can load."""


@dataclass(frozen=True)
class Images:
    """A labelled image data set as four tensors.

    Attributes:
        title: the data set in a word or two.
        name: the data set in words fit for a report.
        classes: class names, in label order, which is also the order from head to tail.
        train: (N, C, H, W) raw training images, uint8.
        train_targets: (N,) labels.
        test: (M, C, H, W) raw test images, uint8.
        test_targets: (M,) labels.
        scale: the largest raw value.
        padding: random shifts in pixels that suit these images.
        flip: whether these images may be mirrored.

    Examples:
        >>> images = load_images("digits")
        >>> images.train.dtype, images.scale, images.classes[:3]
        (torch.uint8, 16.0, ('0', '1', '2'))
    """

    title: str
    name: str
    classes: tuple[str, ...]
    train: Tensor
    train_targets: Tensor
    test: Tensor
    test_targets: Tensor
    scale: float = 255.0
    padding: int = 4
    flip: bool = True


def load_images(dataset: str, root: str | Path | None = None, *, size: int = 32) -> Images:
    """Load a data set into memory.

    Args:
        dataset: ``"digits"`` (scikit-learn's bundled 8x8 handwritten digits, no network needed),
            ``"cifar10"`` or ``"cifar100"`` (through torchvision, downloaded if missing), or ``"folder"``
            (pictures in ``train/<class>/*`` and ``test/<class>/*``).
        root: folder of the data; default for CIFAR: ``data``.
        size: height and width to which a folder's pictures are resized.

    Returns:
        Raw training and test images.

    Raises:
        MetaKDError: the data are missing and could not be downloaded, or the folder is not as described.

    Examples:
        >>> images = load_images("digits")
        >>> images.train.shape[1:], len(images.classes), len(images.test)
        (torch.Size([1, 8, 8]), 10, 600)
    """
    if dataset == "digits":
        return _digits()
    if dataset in ("cifar10", "cifar100"):
        return _cifar(dataset, Path(root or "data"))
    if dataset == "folder":
        if root is None:
            raise MetaKDError("the data set 'folder' needs its location: pass --data-root (root=)")
        return _folder(Path(root), size)
    raise MetaKDError(f"there is no data set named {dataset!r}; there are: {', '.join(DATASETS)}")


def _digits(test_per_class: int = 60) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MetaKDError(
            f"the digits need scikit-learn, which could not be imported ({error}); "
            'install it with `pip install "metakd[examples]"`'
        ) from error
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    # One test set for all seeds, so that their runs are comparable.
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test = torch.cat([shuffled[targets[shuffled] == c][:test_per_class] for c in range(10)])
    rest = torch.ones(len(targets), dtype=torch.bool)
    rest[test] = False
    return Images(
        "digits",
        f"handwritten digits bundled with scikit-learn (8x8 grey; {test_per_class} a class set aside as test images)",
        tuple(str(c) for c in range(10)),
        images[rest],
        targets[rest],
        images[test],
        targets[test],
        scale=16.0,
        padding=1,
        flip=False,
    )


def _cifar(dataset: str, root: Path) -> Images:
    import_torchvision()
    from torchvision import datasets

    kind: Callable[..., Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        parts = [kind(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        raise MetaKDError(
            f"{dataset} is not in {root.resolve()} and could not be downloaded ({error}). Either put "
            f"{getattr(kind, 'filename', 'its archive')} (from {getattr(kind, 'url', 'its site')}) into that "
            "folder, point --data-root to a folder that has it, use pictures of your own with --dataset "
            "folder --data-root <folder that holds train/<class>/* and test/<class>/*>, or use --dataset "
            "digits, which needs no network"
        ) from error
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts)
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[dataset]
    return Images(title, f"{title} (Krizhevsky, 2009)", tuple(parts[0].classes), *train, *test)


def _folder(root: Path, size: int) -> Images:
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise MetaKDError(
                f"there is no folder {root / part}; --data-root must name a folder that holds "
                "train/<class>/* and test/<class>/*, one picture per file"
            )
    train, train_targets, classes = _image_folder(root / "train", size)
    test, test_targets, test_classes = _image_folder(root / "test", size)
    if classes != test_classes:
        raise MetaKDError(
            f"the folders below train and test in {root} differ: {sorted(set(classes) ^ set(test_classes))} "
            "are in only one of them; give both the same classes"
        )
    return Images(root.name, f"the images in the folder {root.name}", classes, train, train_targets, test, test_targets)


def _image_folder(folder: Path, size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    import_torchvision()
    from torchvision import datasets
    from torchvision.transforms import v2

    to_size = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])

    def to_array(image: Any) -> Any:
        return np.asarray(image if image.size == (size, size) else to_size(image))

    try:
        found = datasets.ImageFolder(str(folder), transform=to_array)
    except FileNotFoundError as error:  # no class folder, or an empty one
        raise MetaKDError(f"{folder} is no tree of <class>/<picture> files: {error}") from error
    images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    for i in range(len(found)):
        images[i] = torch.from_numpy(found[i][0].copy()).permute(2, 0, 1)
    return images, torch.tensor(found.targets), tuple(found.classes)
