"""torch.optim.Adagrad."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved, no_steps
from metakd.inner.updates import over_root


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    return {"step": no_steps, "sum": partial(torch.full_like, fill_value=group["initial_accumulator_value"])}


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    g = descent(g, p, group)
    total = torch.addcmul(state["sum"], g, g)
    rate = group["lr"] / (1.0 + state["step"] * group["lr_decay"])
    return moved(over_root(g, total, group["eps"]), p, group, rate), {"step": state["step"] + 1, "sum": total}


ADAGRAD = Rule(("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize"), _start, _step)
