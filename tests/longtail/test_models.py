"""Networks by name: shapes, depths, widths."""

import pytest
import torch
from torch import nn

from metakd.errors import MetaKDError
from metakd.longtail import CifarResNet, build_model, load_weights


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


def test_torchvisions_networks():
    assert build_model("torchvision:resnet18", classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(MetaKDError, match="torchvision has no network named 'resnet19'"):
        build_model("torchvision:resnet19", classes=7)
    with pytest.raises(MetaKDError, match="3 channels, and the images have 1"):
        build_model("torchvision:resnet18", classes=7, channels=1)


def test_timms_networks():
    pytest.importorskip("timm")
    assert build_model("timm:resnet10t", classes=7, channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    "write",
    [
        lambda state, path: torch.save(state, path),
        lambda state, path: torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}, "epoch": 3}, path),
        lambda state, path: torch.save({"model": state}, path),
        lambda state, path: pytest.importorskip("safetensors.torch").save_file(state, path),
    ],
)
def test_weights_are_read_from_a_file(tmp_path, write, request):
    path = tmp_path / ("teacher.safetensors" if "3" in request.node.name else "teacher.pt")
    one, other = (build_model("mlp8", classes=3, channels=1, size=4) for _ in range(2))
    write(one.state_dict(), path)
    load_weights(other, path)
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


def test_files_that_are_no_weights(tmp_path):
    model = build_model("mlp8", classes=3, channels=1, size=4)
    with pytest.raises(MetaKDError, match=r"cannot be read as weights \(FileNotFoundError"):
        load_weights(model, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(MetaKDError, match="cannot be read as weights"):
        load_weights(model, tmp_path / "text.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(MetaKDError, match="holds a list, expected a state dict"):
        load_weights(model, tmp_path / "list.pt")
    torch.save(build_model("mlp4", classes=3, channels=1, size=4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(MetaKDError, match=r"(?s)does not fit Sequential: .*size mismatch"):
        load_weights(model, tmp_path / "other.pt")
