"""The state of a torch optimizer, as the update rules take it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metakd._basics.rng import capturing
from metakd.errors import MetaKDError
from metakd.inner.real import as_real
from metakd.inner.rules import Group, Rule, State


def started(p: Tensor, found: Mapping[str, Any], rule: Rule, group: Group) -> State:
    """The state of a real tensor: the torch optimizer's, or the rule's initial value where that has none."""
    state = {}
    for name, start in rule.start(group).items():
        value = found.get(name)
        if value is None:
            value = start(p)
        elif name not in _NUMBERS:
            value = as_real(value.detach()).to(p.device, p.dtype)
        state[name] = value
    return state


def numbers_off_device(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Copy the states with counts as integers and all numbers on the CPU, by one transfer instead of one sync each.

    Raises:
        MetaKDError: there are counts, and a CUDA graph is being captured, whose replays would all have the same count.
    """
    numbers = {
        (at, name): torch.as_tensor(state[name]).detach()
        for at, state in states.items()
        for name in _NUMBERS
        if state.get(name) is not None
    }
    if numbers and capturing():
        raise MetaKDError(
            f"this call cannot be captured in a CUDA graph: the mirror of an optimizer that counts its steps reads the "
            f"count ({next(iter(numbers))[1]!r}), and a graph would repeat it; take SGD for the student, or inner='sgd'"
        )
    kinds: dict[Any, list[tuple[str, str]]] = {}
    for key, value in numbers.items():
        kinds.setdefault((value.device, value.dtype), []).append(key)
    for keys in kinds.values():
        values = torch.stack([numbers[key].reshape(()) for key in keys]).cpu().unbind()
        numbers.update(zip(keys, values, strict=True))
    result = {at: dict(state) for at, state in states.items()}
    for (at, name), value in numbers.items():
        result[at][name] = _NUMBERS[name](value)
    return result


_NUMBERS: dict[str, Any] = {"step": int, "mu_product": Tensor.clone}
