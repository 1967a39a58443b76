"""torch.optim.RMSprop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved
from metakd.inner.updates import mean, mean_square, over_root


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    names = ["square_avg"] + ["momentum_buffer"] * (group["momentum"] > 0) + ["grad_avg"] * bool(group["centered"])
    return dict.fromkeys(names, torch.zeros_like)


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    g = descent(g, p, group)
    variance = mean_square(state["square_avg"], g, group["alpha"])
    after = {"square_avg": variance}
    if group["centered"]:
        average = after["grad_avg"] = mean(state["grad_avg"], g, group["alpha"])
        variance = torch.addcmul(variance, average, average, value=-1.0)
    direction = over_root(g, variance, group["eps"])
    if group["momentum"] > 0:
        direction = after["momentum_buffer"] = group["momentum"] * state["momentum_buffer"] + direction
    return moved(direction, p, group), after


RMSPROP = Rule(("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"), _start, _step)
