"""Small networks: CIFAR ResNets of any depth and width, and networks for 8x8 digits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd.errors import MetaKDError
from metakd.longtail._torchvision import import_torchvision

_NAMES = (
    "resnet<6n+2>[x<widening>][s<stride of the stem>] (resnet8, resnet8x4, resnet8s2), mlp<hidden>, convnet<width>, "
    "torchvision:<name>, timm:<name>"
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., 2016), which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet for 32x32 images: a 3x3 stem, three stages of (depth - 2) / 6 blocks, a linear classifier.

    Args:
        depth: 6n + 2.
        widths: channels of the stem and of the three stages.
        classes: number of classes.
        channels: channels of the images.
        stride: of the stem; 2 makes everything after it four times cheaper.

    Raises:
        MetaKDError: the depth is not 6n + 2, there are not four widths, or the stride is below 1.

    Examples:
        >>> import torch
        >>> CifarResNet(8, (16, 16, 32, 64), classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widths: Sequence[int], classes: int, channels: int = 3, stride: int = 1) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise MetaKDError(f"depth is {depth}, but a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, 26, 32, ...")
        if len(widths) != 4:
            raise MetaKDError(f"a CIFAR ResNet has four widths, of the stem and of three stages, got {len(widths)}")
        if stride < 1:
            raise MetaKDError(f"stride is {stride}, but must be at least 1")
        stem, *stages = widths
        blocks: list[nn.Module] = []
        inputs = stem
        for stage, outputs in enumerate(stages):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage and not i else 1))
                inputs = outputs
        first = nn.Conv2d(channels, stem, 3, stride, padding=1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(stem), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) images to (B, classes) logits."""
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def mlp(hidden: Sequence[int], classes: int, inputs: int) -> nn.Sequential:
    """A multi-layer perceptron with ReLU for images of ``inputs`` values (channels x height x width)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def convnet(width: int, classes: int, channels: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions with batch normalisation and pooling, and a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


def build_model(name: str, *, classes: int, channels: int = 3, size: int = 32) -> nn.Module:
    """Build a network by name, with random weights.

    ``resnet20`` has widths 16-16-32-64. ``resnet8x4`` has 32-64-128-256: the stem twice, the stages four times
    as wide, as the usual students of distillation papers. ``resnet8s2`` has a stem of stride 2. ``mlp64`` and
    ``mlp64-32`` are perceptrons, ``convnet16`` has two convolutions. ``torchvision:resnet18`` and ``timm:resnet18``
    are those packages' own.

    Args:
        name: see above; depth, widening, stride and widths may be other numbers.
        classes: number of classes.
        channels: channels of the images.
        size: height and width of the images (perceptrons only).

    Returns:
        The network, (B, channels, size, size) images to (B, classes) logits.

    Raises:
        MetaKDError: there is no such network.

    Examples:
        >>> sum(p.numel() for p in build_model("resnet20", classes=10).parameters())
        272474
    """
    if found := re.fullmatch(r"resnet(\d+)(?:x(\d+))?(?:s(\d+))?", name):
        depth, wide = int(found[1]), int(found[2] or 1)
        stem = 16 * max(wide // 2, 1)
        widths = (stem, 16 * wide, 32 * wide, 64 * wide)
        return CifarResNet(depth, widths, classes, channels, stride=int(found[3] or 1))
    if found := re.fullmatch(r"mlp(\d+(?:-\d+)*)", name):
        return mlp([int(width) for width in found[1].split("-")], classes, channels * size * size)
    if found := re.fullmatch(r"convnet(\d+)", name):
        return convnet(int(found[1]), classes, channels)
    package, _, foreign = name.partition(":")
    if foreign and package in _PACKAGES:
        return _PACKAGES[package](foreign, classes, channels)
    raise MetaKDError(f"there is no network named {name!r}; there are: {_NAMES}")


def _torchvisions(name: str, classes: int, channels: int) -> nn.Module:
    if channels != 3:
        raise MetaKDError(f"torchvision's networks take 3 channels, and the images have {channels}")
    models: Any = import_torchvision().models
    if name not in models.list_models():
        raise MetaKDError(f"torchvision has no network named {name!r}; see torchvision.models.list_models()")
    found: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return found


def _timms(name: str, classes: int, channels: int) -> nn.Module:
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        raise MetaKDError(f"timm:{name} needs timm ({error}); install it with `pip install timm`") from error
    if name not in timm.list_models():
        raise MetaKDError(f"timm has no network named {name!r}; see timm.list_models()")
    found: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels)
    return found


_PACKAGES = {"torchvision": _torchvisions, "timm": _timms}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, by torch or safetensors as the file's ending says, into a network.

    A dict that holds the state dict under "state_dict" or "model", as training scripts write it, will do, and so will
    names that begin with "module.", as data parallelism makes them.

    Args:
        model: the network, whose parameters and buffers are overwritten.
        path: the file.

    Raises:
        MetaKDError: the file cannot be read, or does not fit the network.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": nn.Linear(1, 1).state_dict()}, Path(folder) / "teacher.pt")
        ...     load_weights(nn.Linear(1, 1), Path(folder) / "teacher.pt")
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise MetaKDError(f"{path} needs safetensors ({error}); install it with `pip install safetensors`") from error
    except Exception as error:
        raise MetaKDError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise MetaKDError(f"{path} holds a {type(state).__name__}, expected a state dict: names and tensors")
    try:
        model.load_state_dict({str(name).removeprefix("module."): value for name, value in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise MetaKDError(f"{path} does not fit {type(model).__name__}: {str(error)[:500]}") from error
