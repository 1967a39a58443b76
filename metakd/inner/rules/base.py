"""Shared by the update rules of torch.optim."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
"""The settings of a group of parameters, as a torch optimizer holds them."""

State = dict[str, Any]
"""What an optimizer keeps of one parameter, by torch's own names."""


class Rule(NamedTuple):
    """How one torch optimizer moves one real tensor.

    Attributes:
        flags: the settings that it follows.
        start: settings -> name -> (parameter -> initial value), for every entry of the state.
        step: (gradient, parameter, state, settings) -> (what to add to the parameter, new state). Differentiable in
            gradient, parameter and the floating-point tensors of the state; writes to none of them.
        implied: flags that are on if a group does not have them.
    """

    flags: tuple[str, ...]
    start: Callable[[Group], dict[str, Callable[[Tensor], Any]]]
    step: Callable[[Tensor, Tensor, State, Group], tuple[Tensor, State]]
    implied: tuple[str, ...] = ()


def none(p: Tensor) -> None:
    """The initial value of an entry that is absent before the first step."""


def no_steps(p: Tensor) -> int:
    """The initial value of a count of steps."""
    return 0


def descent(g: Tensor, p: Tensor, group: Group) -> Tensor:
    """The gradient to descend: negated for maximize, with weight decay unless that is decoupled."""
    if group.get("maximize", False):
        g = -g
    if group["weight_decay"] and not group.get("decoupled_weight_decay", False):
        g = torch.add(g, p, alpha=group["weight_decay"])
    return g


def moved(direction: Tensor, p: Tensor, group: Group, rate: float | None = None) -> Tensor:
    """What to add to a parameter: -rate * direction, by default at the group's lr, and decoupled weight decay."""
    lr = group["lr"]
    update = (-lr if rate is None else -rate) * direction
    if group["weight_decay"] and group.get("decoupled_weight_decay", False):
        update = torch.add(update, p, alpha=-lr * group["weight_decay"])
    return update
