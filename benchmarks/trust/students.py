"""The students: a network of one hidden layer for features, and a small convolutional one for images."""

import torch
from torch import nn

from benchmarks.trust.data import Task
from benchmarks.trust.presets import Preset


def network(task: Task, preset: Preset, seed: int) -> nn.Module:
    """The student, freshly drawn: the same for every recipe."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = task.train.inputs.shape[1]
        if preset.student == "cnn":
            return convolutional(inputs, preset.hidden, task.classes)
        return nn.Sequential(nn.Linear(inputs, preset.hidden), nn.ReLU(), nn.Linear(preset.hidden, task.classes))


def convolutional(channels: int, width: int, classes: int) -> nn.Module:
    """Three 3 x 3 convolutions of stride 2, of which the first has half the width; the mean over the image."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width // 2), (width // 2, width), (width, width)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
