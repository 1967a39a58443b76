"""Networks by name: shapes, depths, widths."""

import pytest
import torch
from torch import nn

from metakd.errors import MetaKDError
from metakd.longtail import CifarResNet, build_model


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_depth_counts_convolutions_on_the_main_path_and_the_classifier(depth):
    model = build_model(f"resnet{depth}", classes=10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth


@pytest.mark.parametrize(
    ("name", "widths"),
    [("resnet8", [16, 16, 32, 64]), ("resnet8x4", [32, 64, 128, 256]), ("resnet8x2", [16, 32, 64, 128])],
)
def test_widths(name, widths):
    model = build_model(name, classes=7)
    assert [model.stem[0].out_channels] + [block.conv1.out_channels for block in model.blocks] == widths
    assert model.classifier.in_features == widths[-1]


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("resnet8", 3, 32), ("resnet14", 1, 16), ("mlp64", 1, 8), ("mlp32-16", 3, 4), ("convnet4", 1, 8)],
)
def test_logits_for_every_image_and_gradients_for_every_parameter(name, channels, size):
    model = build_model(name, classes=5, channels=channels, size=size)
    logits = model(torch.randn(3, channels, size, size))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_resolution_is_halved_twice():
    model = build_model("resnet8", classes=10)
    assert model.blocks(model.stem(torch.randn(2, 3, 32, 32))).shape == (2, 64, 8, 8)


def test_mlp_sizes():
    linear = [m for m in build_model("mlp32-16", classes=5, channels=1, size=8).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(64, 32), (32, 16), (16, 5)]


@pytest.mark.parametrize("name", ["resnet9", "resnet7", "resnet2"])
def test_impossible_depths(name):
    with pytest.raises(MetaKDError, match=r"6n \+ 2"):
        build_model(name, classes=10)


def test_unknown_names_and_wrong_widths():
    with pytest.raises(MetaKDError, match=r"'vgg11'.*resnet<6n\+2>"):
        build_model("vgg11", classes=10)
    with pytest.raises(MetaKDError, match="four widths"):
        CifarResNet(8, (16, 32), classes=10)
