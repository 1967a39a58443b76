"""Batched augmentation against one image at a time."""

import pytest
import torch
import torch.nn.functional as F

from metakd.longtail import Augment, random_crop_flip


def candidates(image, padding, flip):
    """Every crop of the padded image, mirrored or not."""
    padded = F.pad(image, (padding,) * 4)
    _, height, width = image.shape
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield crop
            if flip:
                yield crop.flip(2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (2, True)])
def test_every_image_is_one_of_its_own_crops(dtype, padding, flip):
    images = torch.randint(1, 255, (64, 3, 6, 5)).to(dtype)
    found = random_crop_flip(images, padding, flip)
    assert found.dtype == dtype
    choices = []
    for image, result in zip(images, found, strict=True):
        matches = [i for i, c in enumerate(candidates(image, padding, flip)) if torch.equal(c, result)]
        assert len(matches) == 1
        choices += matches
    possible = (2 * padding + 1) ** 2 * (1 + flip)
    assert len(set(choices)) > 0.6 * possible  # each image draws for itself, and all crops occur


def test_half_of_the_images_are_mirrored_and_all_shifts_are_equally_likely():
    images = torch.arange(1, 26).view(1, 1, 5, 5).expand(4000, 1, 5, 5)
    mirrored = random_crop_flip(images, 0, True)[:, 0, 0, 0] == 5
    assert 0.47 < mirrored.float().mean() < 0.53
    corner = random_crop_flip(images, 1, False)[:, 0, 2, 2]
    assert torch.bincount(corner).nonzero().flatten().tolist() == [7, 8, 9, 12, 13, 14, 17, 18, 19]
    assert torch.bincount(corner).max() < 1.4 * 4000 / 9


def test_the_generator_decides():
    images = torch.randint(0, 255, (16, 1, 8, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    one, same, other = (random_crop_flip(images, 2, True, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_normalised_training_images_have_mean_zero_and_deviation_one():
    images = torch.randint(0, 17, (200, 2, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 2
    augment = Augment.fitted(images, padding=1, flip=False, scale=16.0)
    values = augment.normalise(images)
    assert values.mean((0, 2, 3)).abs().max() < 1e-5
    assert (values.std((0, 2, 3)) - 1).abs().max() < 1e-5
    assert torch.equal(Augment.fitted(images, padding=0, flip=False, scale=16.0)(images), values)


def test_a_constant_channel_does_not_divide_by_zero():
    images = torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)
    assert Augment.fitted(images, padding=0, flip=False, scale=255.0)(images).isfinite().all()
