"""Images as lossless mosaics, one WebP file a class and split: small enough to carry to a machine without a network.

    python -m benchmarks.longtail.mosaics cifar10 --from data --to carried/cifar10 --imbalance 50

`--from` has mosaics already, or is where torchvision keeps the data set. With an imbalance only the images that its
long tail needs are kept, and the test images: 42 MB of CIFAR-10 at 50. A smaller long tail can be cut from these.
`--validation 3000` keeps more, for a choice among methods on 2,000 images that are set aside.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.command import run
from metakd import MetaKDError
from metakd.longtail import Images, largest_n_max, load_images, long_tail_counts

COLUMNS = 64
VALIDATION = 1000
"""Images of the paper's validation set."""
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def there(folder: Path) -> bool:
    """Whether a folder holds mosaics."""
    return (folder / "index.json").exists()


def read(folder: Path) -> Images:
    """The images of a folder with `index.json` (classes, tile, columns, counts) and `{train,test}/<class>.webp`.

    Raises:
        MetaKDError: a mosaic is missing or smaller than its count.
    """
    index = json.loads((folder / "index.json").read_text())
    parts: list[Tensor] = []
    for split in ("train", "test"):
        tiles = [_tiles(folder / split / f"{name}.webp", index, f"{split}/{name}") for name in index["classes"]]
        parts += [torch.cat(tiles), torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(t) for t in tiles]))]
    title = index.get("title") or TITLES.get(folder.name, folder.name)
    return Images(title, title, tuple(index["classes"]), *parts)


def _tiles(path: Path, index: dict[str, Any], key: str) -> Tensor:
    from PIL import Image  # a machine that trains on other data may lack it

    try:
        mosaic = np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise MetaKDError(f"the mosaic {path} cannot be read: {error}") from error
    size, columns = index["tile"], index["columns"]
    tiles = mosaic.reshape(-1, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    if len(tiles) < index["counts"][key]:
        raise MetaKDError(f"the mosaic {path} has {len(tiles)} images, {index['counts'][key]} expected")
    return torch.from_numpy(np.ascontiguousarray(tiles[: index["counts"][key]]))


def kept(images: Images, imbalance: float | None, validation: int | None = None) -> Tensor:
    """The first images of each class: as many as a long tail and the validation images need, by default 1000 of them.

    With more validation images there are still enough where 1000 are taken, and more of the long tail.
    """
    sizes = torch.bincount(images.train_targets).tolist()
    wanted = sizes
    if imbalance is not None:
        needed = []
        for part in (VALIDATION // len(sizes), (validation or VALIDATION) // len(sizes)):
            available = [size - part for size in sizes]
            tail = long_tail_counts(len(sizes), largest_n_max(available, imbalance), imbalance)
            needed.append([count + part for count in tail])
        wanted = [max(both) for both in zip(*needed, strict=True)]
    return torch.cat([(images.train_targets == c).nonzero().flatten()[:count] for c, count in enumerate(wanted)])


def write(images: Images, folder: Path, imbalance: float | None = None, validation: int | None = None) -> None:
    """Write mosaics that `read` reads; see `kept`."""
    from PIL import Image

    chosen = kept(images, imbalance, validation)
    splits = {
        "train": (images.train[chosen], images.train_targets[chosen]),
        "test": (images.test, images.test_targets),
    }
    size = images.train.shape[-1]
    counts = {}
    for split, (pixels, targets) in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for c, name in enumerate(images.classes):
            tiles = pixels[targets == c]
            rows = -(-len(tiles) // COLUMNS)
            whole = torch.zeros(rows * COLUMNS, 3, size, size, dtype=torch.uint8)
            whole[: len(tiles)] = tiles
            mosaic = whole.view(rows, COLUMNS, 3, size, size).permute(0, 3, 1, 4, 2).reshape(rows * size, -1, 3)
            path = folder / split / f"{name}.webp"
            Image.fromarray(mosaic.numpy()).save(path, lossless=True, quality=75, method=4)
            counts[f"{split}/{name}"] = len(tiles)
    index = {"title": images.title, "classes": images.classes, "tile": size, "columns": COLUMNS, "counts": counts}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    """Read the command line, then the images, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(TITLES))
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--imbalance", type=float)
    parser.add_argument("--validation", type=int, default=VALIDATION, help="validation images, and those set aside")
    args = parser.parse_args()
    found = read(args.source) if there(args.source) else load_images(args.dataset, args.source)
    write(found, args.to, args.imbalance, args.validation)
    print(f"{sum(path.stat().st_size for path in args.to.rglob('*.*')) / 1e6:.1f} MB in {args.to}")


if __name__ == "__main__":
    run(main)
