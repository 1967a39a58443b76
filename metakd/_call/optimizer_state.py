"""Checks a torch optimizer's saved state; torch itself compares the numbers of parameters only."""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metakd._call.saved_state import CURE, check_keys, check_kind, check_state
from metakd.errors import MetaKDError


def check_optimizer_state(saved: Any, optimizer: torch.optim.Optimizer, where: str, key: str = "") -> None:
    """Compare a saved state with the optimizer that will load it.

    Raises:
        MetaKDError: groups, kind of optimizer or the shape of a parameter's state differ; the message names them.
    """
    at = f"{key}." if key else ""
    own = optimizer.state_dict()
    check_keys(saved, own, where, key)
    groups = saved["param_groups"]
    if not isinstance(groups, list) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups
    ):
        raise MetaKDError(f"{where}'s {at + 'param_groups'!r} are no list of groups in the saved state; {CURE}")
    sizes = [[len(group["params"]) for group in these] for these in (groups, own["param_groups"])]
    if sizes[0] != sizes[1]:
        raise MetaKDError(
            f"{where}'s {at + 'param_groups'!r} hold {sizes[0]} parameters in the saved state and {sizes[1]} here; "
            f"{CURE}"
        )
    for theirs, group in zip(groups, own["param_groups"], strict=True):
        check_kind(theirs.keys() - _OF_SCHEDULERS, group.keys() - _OF_SCHEDULERS, f"{where}'s {at + 'param_groups'!r}")
        for name in (group.keys() & theirs.keys()) - {"params"}:
            check_state(theirs[name], group[name], where, f"{at}param_groups.{name}")
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = chain.from_iterable(group["params"] for group in groups)
    check_keys(saved["state"], {}, where, f"{at}state", known=(by_number := dict(zip(numbers, params, strict=True))))
    names: dict[int, set[str]] = {}
    for number, held in saved["state"].items():
        names.setdefault(by_number[number].ndim, set()).update(held)
    for number, held in saved["state"].items():
        p, place = by_number[number], f"{at}state.{number}"
        check_keys(held, optimizer.state.get(p) or dict.fromkeys(names[p.ndim]), where, place)
        for name, value in held.items():
            # A tensor with the parameter's number of dimensions has one number per entry, or per row or column.
            if isinstance(value, Tensor) and value.ndim == p.ndim and not _fits(value, p):
                shapes = f"shape {tuple(value.shape)} in the saved state, for a parameter of {tuple(p.shape)}"
                raise MetaKDError(f"{where}'s {place + '.' + str(name)!r} has {shapes} here; {CURE}")


def load_optimizer_state(saved: Any, optimizer: torch.optim.Optimizer, where: str, key: str = "") -> None:
    """Check a saved state, and load a copy of it into the optimizer.

    Raises:
        MetaKDError: it does not fit, or the optimizer lacks a setting after loading; the caller then rolls back.
    """
    check_optimizer_state(saved, optimizer, where, key)
    settings = [group.keys() - _OF_SCHEDULERS for group in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(saved))
    for group, names in zip(optimizer.param_groups, settings, strict=True):
        check_keys(group, dict.fromkeys(names), where, f"{key}.param_groups" if key else "param_groups", known=group)
        if group.get("capturable") and all(p.device.type == "cpu" for p in group["params"]):
            group["capturable"] = False  # saved on a GPU; on a CPU torch refuses to step with it


def _fits(value: Tensor, p: Tensor) -> bool:
    return all(a in (b, 1) for a, b in zip(value.shape, p.shape, strict=True))


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "params"}
