"""torch.optim.SGD."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved, none
from metakd.inner.updates import momentum_step


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    return {"momentum_buffer": none} if group["momentum"] else {}


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    direction = descent(g, p, group)
    if group["momentum"]:
        settings = {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        direction, buffer = momentum_step(direction, state["momentum_buffer"], **settings)
        state = {"momentum_buffer": buffer}
    return moved(direction, p, group), state


SGD = Rule(("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"), _start, _step)
