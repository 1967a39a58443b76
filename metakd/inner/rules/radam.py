"""torch.optim.RAdam."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved, no_steps
from metakd.inner.updates import mean, mean_square, radam_direction


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    return {"step": no_steps, "exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    b1, b2 = (float(b) for b in group["betas"])
    t, g = state["step"] + 1, descent(g, p, group)
    m, v = mean(state["exp_avg"], g, b1), mean_square(state["exp_avg_sq"], g, b2)
    direction = radam_direction(m, v, t, b1=b1, b2=b2, eps=group["eps"])
    return moved(direction, p, group), {"step": t, "exp_avg": m, "exp_avg_sq": v}


RADAM = Rule(("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"), _start, _step)
