"""BiKD, and what might help it: other rates, inputs, upper losses and scales of its weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.longtail.setting import Setting
from metakd import BilevelLossBalancer, recipes
from metakd.recipes.base import hard_and_soft
from metakd.weighting import ClassAware, Normalised
from metakd.weighting.features import Features, student_and_teacher


def bikd(*, faster: float = 1.0, **options: Any) -> Callable[[Setting], BilevelLossBalancer]:
    """BiKD's weight model over CE and KD, its learning rate times `faster`."""

    def build(setting: Setting) -> BilevelLossBalancer:
        student, teacher, optimizer, counts, preset = setting
        lr = preset.weighting_lr * faster
        return recipes.bikd(student, teacher, optimizer=optimizer, classes=len(counts), lr=lr, **options)

    return build


def with_teacher_in_train_mode(setting: Setting) -> BilevelLossBalancer:
    """The published CIFAR-10 command, with the teacher in train mode, as the published code leaves it."""

    def judged(inputs: Any) -> Any:
        return setting.teacher.train()(inputs)  # a function's modules keep their mode

    return bikd(setting="cifar10")(setting._replace(teacher=judged))


def bikd_from(start: float) -> Callable[[Setting], BilevelLossBalancer]:
    """BiKD with weights near `start` at first, in place of a half."""

    def build(setting: Setting) -> BilevelLossBalancer:
        balancer = bikd(accumulate=1)(setting)
        with torch.no_grad():
            balancer.weighting.layers[-1].bias.fill_(math.log(start / (1 - start)))
        return balancer

    return build


def bikd_with_more_inputs(*, accumulate: int) -> Callable[[Setting], BilevelLossBalancer]:
    """The weight model also sees the entropies of student and teacher, and how rare the label's class is."""

    def build(setting: Setting) -> BilevelLossBalancer:
        return _of_parts(setting, setting.network(5), ClassAware(setting.counts), accumulate=accumulate)

    return build


def bikd_with_shares(setting: Setting) -> BilevelLossBalancer:
    """The weights of a batch have a mean of a half, so that the weight model cannot turn the learning rate down."""
    return _of_parts(setting, Normalised(setting.network(2)), student_and_teacher)


def _of_parts(setting: Setting, weighting: nn.Module, features: Features, **options: Any) -> BilevelLossBalancer:
    lr = setting.preset.weighting_lr
    return setting.balancer(hard_and_soft(4.0), weighting, lr=lr, weight_decay=1e-4, features=features, **options)
