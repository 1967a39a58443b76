"""Loading data sets; what is missing is said with the way out."""

import os
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from metakd.errors import MetaKDError
from metakd.longtail import LongTailed, load_images
from metakd.longtail._torchvision import import_torchvision


def picture(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    for part, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.png", (10 * c, i, 200))
    return tmp_path


def test_digits_have_a_fixed_balanced_test_set_and_are_never_mirrored():
    one, two = load_images("digits"), load_images("digits")
    assert torch.equal(one.test, two.test)
    assert torch.bincount(one.test_targets).tolist() == [60] * 10
    assert len(one.train) + len(one.test) == 1797
    assert one.train.dtype == torch.uint8 and one.train.max() == one.scale == 16
    assert not one.flip
    assert "digits" in one.name and "scikit-learn" in one.name


def test_folder_reads_pixels_labels_and_classes(tree):
    images = load_images("folder", tree)
    assert images.classes == ("ant", "bee", "cat")
    assert images.train.shape == (18, 3, 32, 32) and images.test.shape == (6, 3, 32, 32)
    for image, target in zip(images.train, images.train_targets, strict=True):
        assert image[0].unique().tolist() == [10 * target]
        assert image[2].unique().tolist() == [200]


def test_folder_brings_pictures_of_any_shape_to_one_size(tree):
    picture(tree / "train" / "ant" / "wide.jpg", (0, 0, 200), size=(90, 40))
    picture(tree / "train" / "ant" / "tall.jpg", (0, 0, 200), size=(20, 50))
    images = load_images("folder", tree, size=16)
    assert images.train.shape == (20, 3, 16, 16)
    assert (images.train[:, 2].float() - 200).abs().max() < 5


def test_folder_without_a_root_or_parts_says_what_it_needs(tmp_path):
    with pytest.raises(MetaKDError, match="--data-root"):
        load_images("folder")
    with pytest.raises(MetaKDError, match=r"no folder .*train.*train/<class>/\*"):
        load_images("folder", tmp_path)


def test_folder_with_an_empty_class_or_without_classes_is_an_error(tree):
    (tree / "train" / "dog").mkdir()
    with pytest.raises(MetaKDError, match="dog"):
        load_images("folder", tree)
    with pytest.raises(MetaKDError, match="is no tree of <class>/<picture>"):
        load_images("folder", _bare(tree / "bare"))


def _bare(root: Path) -> Path:
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
    return root


def test_folder_with_other_classes_in_test_is_an_error(tree):
    (tree / "test" / "cat").rename(tree / "test" / "cow")
    with pytest.raises(MetaKDError, match=r"\['cat', 'cow'\]"):
        load_images("folder", tree)


def test_unknown_data_set_lists_the_known():
    with pytest.raises(MetaKDError, match=r"'imagenet'.*digits, cifar10, cifar100, folder"):
        load_images("imagenet")


def test_cifar_without_data_and_network_says_what_to_do(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision import datasets

    class Offline:
        filename, url = "cifar-10-python.tar.gz", "https://example.org/cifar-10-python.tar.gz"

        def __init__(self, root, train, download):
            raise URLError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", Offline)
    with pytest.raises(MetaKDError) as caught:
        load_images("cifar10", tmp_path)
    message = str(caught.value)
    for words in (
        str(tmp_path),
        "no route to host",
        "cifar-10-python.tar.gz",
        "--data-root",
        "folder",
        "digits",
    ):
        assert words in message
    assert isinstance(caught.value.__cause__, URLError)


def test_cifar_takes_images_and_labels_from_torchvision(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision import datasets

    def fake(root, train, download):
        n = 7 if train else 3
        data = np.arange(n * 32 * 32 * 3, dtype=np.uint64).reshape(n, 32, 32, 3).astype(np.uint8)
        return SimpleNamespace(data=data, targets=list(range(n)), classes=["a", "b"])

    monkeypatch.setattr(datasets, "CIFAR100", fake)
    images = load_images("cifar100", tmp_path)
    assert images.name.startswith("CIFAR-100")
    assert images.train.shape == (7, 3, 32, 32) and images.test.shape == (3, 3, 32, 32)
    assert images.train[0, :, 0, 0].tolist() == [0, 1, 2]
    assert images.train[0, 0, 0, :2].tolist() == [0, 3]
    assert images.train_targets.tolist() == list(range(7))


@pytest.mark.skipif("METAKD_CIFAR10" not in os.environ, reason="METAKD_CIFAR10 names no folder of real CIFAR-10")
def test_real_cifar10_folder_gives_the_field_s_split():
    images = load_images("folder", os.environ["METAKD_CIFAR10"])
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert images.classes == tuple(names.split())
    data = LongTailed.cut(images, 50)
    assert (len(data.train.targets), len(data.validation.targets), len(data.test.targets)) == (
        13_717,
        1000,
        10_000,
    )
    assert data.counts[0] == 4900 and data.counts[-1] == 98
    mean = torch.tensor(data.train.augment.mean)
    assert (mean - torch.tensor([0.50, 0.50, 0.50])).abs().max() < 0.06  # real photographs, head-heavy
