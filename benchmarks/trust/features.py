"""Fixed features of the images, made without labels and the same for every method: those of Coates, Lee, Ng (2011)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.longtail import Images

PATCH = 6


def features_of(images: Images, *, filters: int, stride: int, components: int) -> tuple[Tensor, Tensor]:
    """Features of the training and the test images, standardised; all that is fitted is fitted to training images.

    Patches of 6 x 6 pixels are normalised and whitened, and compared with the means that k-means finds ("triangle"
    activation); the activations are summed over the four quarters of the image, and projected onto their principal
    components. No label is used. Source: Coates, Lee, Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature
    Learning" (AISTATS 2011).

    Args:
        images: the data set.
        filters: means of k-means; 0 takes the pixels.
        stride: of the patches.
        components: of the result, at most.
    """
    generator = torch.Generator().manual_seed(0)
    if filters:
        whiten = _Whitening(images.train, generator)
        centres = _k_means(whiten(_random_patches(images.train, 60 * filters, generator)), filters, generator)
        train, test = (
            torch.cat([_activations(part, whiten, centres, stride) for part in whole.split(200)])
            for whole in (images.train, images.test)
        )
    else:
        train, test = (part.flatten(1).float() for part in (images.train, images.test))
    mean, deviation = train.mean(0), train.std(0) + (0.01 if filters else images.scale / 4)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    if components < train.shape[1]:
        values, vectors = torch.linalg.eigh(train.T @ train / len(train))
        basis = vectors[:, -components:] / values[-components:].clamp_min(1e-6).pow(0.25)  # half-way to whitening
        train, test = train @ basis, test @ basis
    scale = train.pow(2).mean().sqrt()
    return train / scale, test / scale


def _normalised(patches: Tensor) -> Tensor:
    patches = patches - patches.mean(-1, keepdim=True)
    return patches / (patches.var(-1, keepdim=True) + 10).sqrt()


def _random_patches(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    channels, height, width = images.shape[1:]
    rows = torch.randint(len(images), (count,), generator=generator)
    tops = torch.randint(height - PATCH + 1, (count,), generator=generator)
    lefts = torch.randint(width - PATCH + 1, (count,), generator=generator)
    steps = torch.arange(PATCH)
    y, x = (tops[:, None, None] + steps[:, None]), (lefts[:, None, None] + steps[None, :])
    found = images[rows[:, None, None], :, y, x]  # (count, 6, 6, channels)
    return _normalised(found.permute(0, 3, 1, 2).reshape(count, channels * PATCH**2).float())


class _Whitening:
    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        patches = _random_patches(images, 20_000, generator)
        self.mean = patches.mean(0)
        centred = patches - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        self.matrix = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T

    def __call__(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) @ self.matrix


def _k_means(patches: Tensor, filters: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    centres = patches[torch.randperm(len(patches), generator=generator)[:filters]]
    for _ in range(rounds):
        nearest = (patches @ centres.T - centres.pow(2).sum(1) / 2).argmax(1)
        counts = torch.bincount(nearest, minlength=filters)
        sums = torch.zeros_like(centres).index_add_(0, nearest, patches)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centres)
    return centres


def _activations(images: Tensor, whiten: _Whitening, centres: Tensor, stride: int) -> Tensor:
    patches = F.unfold(images.float(), PATCH, stride=stride)
    across = round(patches.shape[2] ** 0.5)
    x = whiten(_normalised(patches.transpose(1, 2)))
    squares = x.pow(2).sum(-1, keepdim=True) + centres.pow(2).sum(1)
    distances = (squares - 2 * x @ centres.T).clamp_min(0).sqrt()
    active = F.relu(distances.mean(-1, keepdim=True) - distances)
    grid = active.transpose(1, 2).reshape(len(images), -1, across, across)
    return F.adaptive_avg_pool2d(grid, 2).flatten(1)
