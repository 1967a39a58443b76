"""torch.optim.Adam and AdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved, no_steps
from metakd.inner.updates import adam_direction, mean, mean_square


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    largest = {"max_exp_avg_sq": torch.zeros_like} if group["amsgrad"] else {}
    return {"step": no_steps, "exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like, **largest}


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    b1, b2 = (float(b) for b in group["betas"])
    t, g = state["step"] + 1, descent(g, p, group)
    m, v = mean(state["exp_avg"], g, b1), mean_square(state["exp_avg_sq"], g, b2)
    after = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if group["amsgrad"]:
        v = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    return moved(adam_direction(m, v, (1.0 - b1**t, 1.0 - b2**t), eps=group["eps"]), p, group), after


_FLAGS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")

ADAM = Rule(_FLAGS, _start, _step)

# In older torch AdamW is a separate class, whose groups lack this flag.
ADAMW = Rule(_FLAGS, _start, _step, ("decoupled_weight_decay",))
