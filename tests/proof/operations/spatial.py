"""Convolutions, pooling, padding, interpolation, sampling on grids."""

import torch
import torch.nn.functional as F

from tests.proof.registry import grid, operation, operations, shaped, spread


def line(function, *shape):
    """A function of a signal (B, C, L)."""
    return lambda x, a: function(spread(x @ a, *(shape or (2, 6))))


def image(function, *shape):
    """A function of an image (B, C, H, W)."""
    return lambda x, a: function(spread(x @ a, *(shape or (2, 4, 4))))


operations(
    conv1d=lambda x, a: F.conv1d(spread(x, 2, 5), shaped(a, 3, 2, 2), shaped(a, 3), padding=1),
    conv1d_groups=lambda x, a: F.conv1d(spread(x, 4, 5), shaped(a, 4, 2, 2), groups=2, dilation=2),
    conv2d=lambda x, a: F.conv2d(spread(x, 2, 4, 4), shaped(a, 2, 2, 3, 3), shaped(a, 2), stride=2, padding=1),
    conv2d_depthwise=lambda x, a: F.conv2d(spread(x, 2, 4, 4), shaped(a, 2, 1, 3, 3), padding="same", groups=2),
    conv3d=lambda x, a: F.conv3d(spread(x, 1, 3, 3, 3), shaped(a, 2, 1, 2, 2, 2)),
    conv_transpose1d=lambda x, a: F.conv_transpose1d(spread(x, 2, 3), shaped(a, 2, 2, 3), stride=2),
    conv_transpose2d=lambda x, a: F.conv_transpose2d(spread(x, 2, 3, 3), shaped(a, 2, 1, 2, 2), shaped(a, 1), stride=2),
    avg_pool1d=line(lambda z: F.avg_pool1d(z, 3, 1, 1)),
    avg_pool2d=image(lambda z: F.avg_pool2d(z, 2, 1, 1, count_include_pad=False)),
    avg_pool3d=image(lambda z: F.avg_pool3d(z, 2), 1, 4, 2, 2),
    max_pool1d=line(lambda z: F.max_pool1d(z, 2)),
    max_pool2d=image(lambda z: F.max_pool2d(z, 2, 1, 1)),
    max_pool3d=image(lambda z: F.max_pool3d(z, 2), 1, 4, 2, 2),
    max_pool2d_indices=image(lambda z: F.max_pool2d(z, 2, return_indices=True)[0]),
    max_unpool1d=line(lambda z: F.max_unpool1d(*F.max_pool1d(z, 2, return_indices=True), 2)),
    max_unpool2d=image(lambda z: F.max_unpool2d(*F.max_pool2d(z, 2, return_indices=True), 2)),
    adaptive_avg_pool1d=line(lambda z: F.adaptive_avg_pool1d(z, 4)),
    adaptive_avg_pool2d=image(lambda z: F.adaptive_avg_pool2d(z, 3)),
    adaptive_max_pool1d=line(lambda z: F.adaptive_max_pool1d(z, 3)),
    adaptive_max_pool2d=image(lambda z: F.adaptive_max_pool2d(z, 2)),
    lp_pool1d=line(lambda z: F.lp_pool1d(z.square() + 0.1, 2, 2)),
    lp_pool2d=image(lambda z: F.lp_pool2d(z.square() + 0.1, 3, 2)),
    adaptive_avg_pool3d=image(lambda z: F.adaptive_avg_pool3d(z, 2), 1, 3, 3, 3),
    adaptive_max_pool3d=image(lambda z: F.adaptive_max_pool3d(z, 2), 1, 3, 3, 3),
    max_unpool3d=image(lambda z: F.max_unpool3d(*F.max_pool3d(z, 2, return_indices=True), 2), 1, 4, 2, 2),
    unfold=image(lambda z: F.unfold(z, 2)),
    fold=line(lambda z: F.fold(z, 3, 2), 8, 4),
    tensor_unfold=line(lambda z: z.unfold(2, 3, 2)),
    pixel_shuffle=image(lambda z: F.pixel_shuffle(z, 2), 4, 2, 2),
    pixel_unshuffle=image(lambda z: F.pixel_unshuffle(z, 2)),
    channel_shuffle=image(lambda z: F.channel_shuffle(z, 2), 4, 2, 2),
    interpolate_nearest=line(lambda z: F.interpolate(z, 9, mode="nearest")),
    interpolate_nearest_exact=image(lambda z: F.interpolate(z, 5, mode="nearest-exact")),
    interpolate_linear=line(lambda z: F.interpolate(z, 9, mode="linear")),
    interpolate_bilinear=image(lambda z: F.interpolate(z, 5, mode="bilinear")),
    interpolate_bilinear_corners=image(lambda z: F.interpolate(z, 5, mode="bilinear", align_corners=True)),
    interpolate_antialias=image(lambda z: F.interpolate(z, 2, mode="bilinear", antialias=True)),
    interpolate_bicubic=image(lambda z: F.interpolate(z, 5, mode="bicubic")),
    interpolate_bicubic_antialias=image(lambda z: F.interpolate(z, 2, mode="bicubic", antialias=True)),
    interpolate_trilinear=image(lambda z: F.interpolate(z, 3, mode="trilinear"), 1, 2, 2, 2),
    interpolate_area=image(lambda z: F.interpolate(z, 3, mode="area")),
    pad_constant=line(lambda z: F.pad(z, (1, 2), value=0.5)),
    pad_negative=line(lambda z: F.pad(z, (-1, 2))),
    pad_reflect=line(lambda z: F.pad(z, (2, 1), mode="reflect")),
    pad_reflect_2d=image(lambda z: F.pad(z, (1, 1, 2, 0), mode="reflect")),
    pad_replicate=line(lambda z: F.pad(z, (2, 1), mode="replicate")),
    pad_replicate_2d=image(lambda z: F.pad(z, (1, 1, 2, 0), mode="replicate")),
    pad_reflect_3d=image(lambda z: F.pad(z, (1, 1, 1, 1, 1, 1), mode="reflect"), 1, 2, 2, 2),
    pad_replicate_3d=image(lambda z: F.pad(z, (1, 1, 1, 1, 1, 1), mode="replicate"), 1, 2, 2, 2),
    pad_circular=line(lambda z: F.pad(z, (2, 1), mode="circular")),
)


def _sampled(x, a, **options):
    """An image read at places that depend on the operand."""
    places = 0.9 * (grid(len(x), 3, 3, 2) + spread(x @ a, 3, 3, 2)).tanh()
    return F.grid_sample(spread(x, 2, 4, 4), places, align_corners=False, **options)


operations(
    grid_sample=lambda x, a: _sampled(x, a, mode="bilinear"),
    grid_sample_border=lambda x, a: _sampled(x, a, mode="bilinear", padding_mode="border"),
    grid_sample_reflection=lambda x, a: _sampled(x, a, mode="bilinear", padding_mode="reflection"),
    grid_sample_nearest=lambda x, a: _sampled(x, a, mode="nearest") + spread(x @ a, 2, 3, 3),
    grid_sample_bicubic=lambda x, a: _sampled(x, a, mode="bicubic"),
)


@operation
def grid_sample_3d(x, a):
    places = 0.9 * (grid(len(x), 2, 2, 2, 3) + spread(x @ a, 2, 2, 2, 3)).tanh()
    return F.grid_sample(spread(x, 1, 3, 3, 3), places, align_corners=True)


@operation
def convolution_channels_last(x, a):
    return F.conv2d(spread(x, 2, 3, 3).contiguous(memory_format=torch.channels_last), shaped(a, 2, 2, 2, 2))


@operation
def affine_grid(x, a):
    theta = 0.5 * (torch.eye(2, 3, dtype=x.dtype) + 0.3 * spread(x @ a, 2, 3).tanh())
    places = F.affine_grid(theta, [len(x), 2, 3, 3], align_corners=False)
    return F.grid_sample(spread(x, 2, 4, 4), places, align_corners=False)


@operation
def convolution_per_sample(x, a):
    """Kernels that a network writes, by groups."""
    kernels = spread(x @ a, 1, 2, 3)
    return F.conv1d(spread(x, 2, 5).reshape(1, -1, 5), kernels.flatten(0, 1), groups=len(x))[0]
