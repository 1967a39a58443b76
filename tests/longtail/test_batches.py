"""Batches: a function of seed and epoch, every image at most once, evaluation untouched by augmentation."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from metakd.errors import MetaKDError
from metakd.longtail import Augment, Batches, Images, LongTailed


def batches(n=50, batch_size=16, seed=0, stream=0):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4)
    augment = Augment(mean=(0.0,), std=(1.0,), padding=0, flip=False, scale=1.0)
    return Batches(images, torch.arange(n) % 3, augment, batch_size, seed, stream)


def same(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def images(sizes=(90, 80, 70, 60)):
    targets = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    train = torch.randint(0, 256, (len(targets), 3, 8, 8), dtype=torch.uint8)
    return Images("toy", "toy images", tuple("abcd"), train, targets, train[:40], targets[:40], padding=2)


def test_an_epoch_holds_every_image_at_most_once_and_index_tells_which():
    found = list(batches().epoch(0))
    index = torch.cat([i for _, _, i in found])
    assert len(found) == len(batches()) == 3
    assert len(index.unique()) == len(index) == 48
    for inputs, targets, which in found:
        assert torch.equal(inputs[:, 0, 0, 0], which.float())
        assert torch.equal(targets, which % 3)


def test_order_is_a_function_of_seed_epoch_and_stream():
    loader = batches()
    assert same(list(loader.epoch(2)), list(loader.epoch(2)))
    for other in (loader.epoch(3), batches(seed=1).epoch(2), batches(stream=1).epoch(2)):
        assert not same(list(loader.epoch(2)), list(other))


def test_augmentation_is_a_function_of_seed_and_epoch_whatever_else_is_drawn():
    loader = replace(batches(), augment=Augment((0.0,), (1.0,), padding=1, flip=True, scale=1.0))
    first = list(loader.epoch(0))
    torch.rand(7)
    assert same(first, list(loader.epoch(0)))


def test_endless_batches_go_on_and_are_reshuffled():
    found = [index for _, _, index in islice(batches().endless(0), 9)]
    passes = [torch.cat(found[i : i + 3]) for i in (0, 3, 6)]
    assert all(len(p.unique()) == 48 for p in passes)
    assert not torch.equal(passes[0], passes[1])


def test_a_batch_larger_than_the_data_is_all_of_the_data():
    (only,) = batches(n=5).epoch(0)
    assert sorted(only[2].tolist()) == [0, 1, 2, 3, 4]


def test_plain_is_in_order_and_complete():
    inputs, _, index = (torch.cat(parts) for parts in zip(*batches(n=200).plain(), strict=True))
    assert index.tolist() == list(range(200))
    assert inputs[:, 0, 0, 0].tolist() == list(range(200))


def test_cut_gives_disjoint_training_and_validation_images_and_all_test_images():
    whole = images()
    data = LongTailed.cut(whole, 5, batch_size=10, validation_per_class=4)
    assert data.counts == (86, 50, 29, 17)
    assert torch.bincount(data.train.targets).tolist() == [86, 50, 29, 17]
    assert torch.bincount(data.validation.targets).tolist() == [4] * 4
    assert torch.equal(data.test.images, whole.test)
    train = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in train for image in data.validation.images)
    assert data.validation.augment.padding == 2  # validation images get the training augmentation
    assert "182 long-tailed training images (86 to 17 a class)" in data.describe()


def test_normalisation_is_fitted_to_the_long_tailed_training_images_only():
    whole = images()
    data = LongTailed.cut(whole, 5, batch_size=10)
    expected = Augment.fitted(data.train.images, padding=2, flip=True, scale=255.0)
    assert data.test.augment == data.train.augment == expected


@pytest.mark.parametrize(("sizes", "expected"), [((400, 300, 300, 300), 225), ((1000,) * 4, 250)])
def test_default_validation_is_the_protocols_but_leaves_a_quarter_of_the_smallest_class(sizes, expected):
    data = LongTailed.cut(images(sizes), 1.2, batch_size=10)
    assert torch.bincount(data.validation.targets).tolist() == [expected] * 4


def test_a_batch_size_above_the_training_set_is_an_error():
    with pytest.raises(MetaKDError, match="182 images, less than one batch of 500"):
        LongTailed.cut(images(), 5, batch_size=500, validation_per_class=4)
