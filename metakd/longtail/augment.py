"""Random crop, flip and normalisation of a whole batch, with a separate draw for every image.

A torchvision transform draws one crop for a whole batch tensor, so it needs one call per image. Here a single gather
shifts every image by its own offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by its own random offset (zero padding) and mirror it with probability one half.

    This equals padding by ``padding`` on all sides, a random crop to the old size, and a random horizontal flip.

    Args:
        images: (B, C, H, W), any dtype.
        padding: largest shift in pixels, in both directions; 0 for none.
        flip: whether to mirror half of the images from left to right.
        generator: source of the random numbers (CPU); default: the global one.

    Returns:
        (B, C, H, W), same dtype.

    Examples:
        >>> random_crop_flip(torch.ones(2, 3, 8, 8), padding=1, flip=True).shape
        torch.Size([2, 3, 8, 8])
    """
    return crop(images, draw_crops(images, padding, flip, generator).to(images.device), padding)


def draw_crops(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Which rows and columns of the padded images to take: (2, B, side) on the CPU, side the longer one of H and W."""
    batch, _, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows, columns = shift + torch.arange(max(height, width))
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns[:, :width] = torch.where(mirrored, columns[:, :width].flip(1), columns[:, :width])
    return torch.stack([rows, columns])


def crop(images: Tensor, taken: Tensor, padding: int) -> Tensor:
    """The rows and columns that `draw_crops` drew; all tensors on one device, which the host does not wait for."""
    batch, _, height, width = images.shape
    rows, columns = taken[0, :, :height], taken[1, :, :width]
    padded = F.pad(images, (padding,) * 4)
    which = torch.arange(batch, device=images.device)
    picked = padded.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)  # channels_last, which is faster for convolutions


@dataclass(frozen=True)
class Augment:
    """Augmentation and normalisation of a batch of raw images.

    Attributes:
        mean: mean per channel, on the scale of the raw images divided by ``scale``.
        std: standard deviation per channel, on the same scale.
        padding: largest random shift in pixels.
        flip: whether to mirror at random. Not for digits: a mirrored digit is none.
        scale: the raw images' largest value.

    Examples:
        >>> augment = Augment(mean=(0.5,), std=(0.25,), padding=4, flip=True)
        >>> images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
        >>> augment(images).shape, augment.normalise(images).dtype
        (torch.Size([2, 1, 32, 32]), torch.float32)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    scale: float = 255.0

    @classmethod
    def fitted(cls, images: Tensor, *, padding: int, flip: bool, scale: float) -> Augment:
        """With the mean and standard deviation of ``images`` (N, C, H, W), which should be training images only."""
        values = images.to(torch.float32).div_(scale)
        mean = values.mean((0, 2, 3))
        std = values.std((0, 2, 3)).clamp_min(1e-3)
        return cls(tuple(mean.tolist()), tuple(std.tolist()), padding, flip, scale)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment and normalise raw images (B, C, H, W) to float32 (B, C, H, W)."""
        if self.padding or self.flip:
            images = random_crop_flip(images, self.padding, self.flip, generator)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise without augmentation, for validation and test images."""
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        return (images.to(torch.float32) / self.scale - mean) / std


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) constants, copied to a device once: each copy would make the host wait for the device."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
