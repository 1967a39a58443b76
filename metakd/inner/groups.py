"""The student's torch optimizers and their parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from metakd._autodiff import Params
from metakd.errors import MetaKDError

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
"""The student's own torch optimizer, or several that hold its parameters together, such as Muon and AdamW."""


class Held(NamedTuple):
    """A group of an optimizer, with the names of the student's parameters in it."""

    optimizer: torch.optim.Optimizer
    number: int
    group: dict[str, Any]
    names: list[str]


def optimizers(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """Return the user's torch optimizers, one or several, without wrappers.

    A wrapper keeps its optimizer as `.optimizer`, as in Accelerate and Lightning.

    Args:
        optimizer: a torch optimizer, or a list or tuple of them.

    Returns:
        The optimizers, in order.

    Raises:
        MetaKDError: `optimizer` is anything else, or empty.

    Examples:
        >>> w, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> [type(o).__name__ for o in optimizers([torch.optim.SGD([w]), torch.optim.Adam([b])])]
        ['SGD', 'Adam']
    """
    several = isinstance(optimizer, list | tuple) and not hasattr(optimizer, "_fields")
    given: Any = optimizer if several else [optimizer]
    found = tuple(_bare(one) for one in given)
    wrong = [type(one).__name__ for one in found if not isinstance(one, torch.optim.Optimizer)]
    if wrong or not found:
        got = f"{'a list that holds ' if several else ''}{wrong[0]}" if wrong else "an empty list"
        raise MetaKDError(
            "optimizer must be the student's torch optimizer, or a list of several that hold its parameters together, "
            f"got {got}; pass the one whose step() trains the student, such as "
            "torch.optim.SGD(student.parameters(), lr=0.1)"
        )
    return found


def param_groups(optimizer: Optimizers) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    """Return all parameter groups, each with its optimizer.

    Args:
        optimizer: a torch optimizer, or a list or tuple of them, with or without wrappers.

    Returns:
        (optimizer, group) for each group: the very dicts that the optimizers hold.

    Raises:
        MetaKDError: see `optimizers`.

    Examples:
        >>> w, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> both = torch.optim.SGD([w], lr=0.5), torch.optim.Adam([b], lr=0.25)
        >>> [(type(optimizer).__name__, group["lr"]) for optimizer, group in param_groups(both)]
        [('SGD', 0.5), ('Adam', 0.25)]
    """
    return [(one, group) for one in optimizers(optimizer) for group in one.param_groups]


def learning_rate(group: Mapping[str, Any]) -> float | None:
    """Return the learning rate of a parameter group, or None if the optimizer sets its own.

    Args:
        group: one of an optimizer's `param_groups`.

    Returns:
        Its `lr` as a number; None if it has none or no number, as in Hugging Face's Adafactor.

    Examples:
        >>> learning_rate({"lr": torch.tensor(0.5)}), learning_rate({"lr": None}), learning_rate({})
        (0.5, None, None)
    """
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError):
        return None


def held_groups(optimizer: Optimizers, params: Params) -> list[Held]:
    """Return the groups that hold the parameters; raise if a parameter is in no group or in several."""
    every = [(one, number, group) for one in optimizers(optimizer) for number, group in enumerate(one.param_groups)]
    places: dict[int, list[int]] = {}
    for place, (_, _, group) in enumerate(every):
        for p in group["params"]:
            places.setdefault(id(p), []).append(place)
    missing = [name for name, p in params.items() if id(p) not in places]
    if missing and len(missing) == len(params):
        raise MetaKDError(
            "the optimizer holds none of the student's trainable parameters, so it belongs to another model (or to a "
            "copy made earlier); build it as torch.optim.SGD(student.parameters(), ...)"
        )
    if missing:
        raise MetaKDError(
            f"{len(missing)} trainable parameter(s) of the student are not in the optimizer: {missing[:5]}; "
            "add them to it, or freeze them with requires_grad_(False)"
        )
    names: dict[int, list[str]] = {}
    for name, p in params.items():
        place, *others = places[id(p)]
        if others:
            kinds = " and ".join(type(every[i][0]).__name__ for i in places[id(p)])
            raise MetaKDError(
                f"the parameter {name!r} is held {len(others) + 1} times, by {kinds}, and each would move it; keep it "
                "in one group of one optimizer"
            )
        names.setdefault(place, []).append(name)
    return [Held(*every[place], names[place]) for place in sorted(names)]


def required_rate(held: Held) -> float:
    """Return the learning rate of a group, or raise."""
    rate = learning_rate(held.group)
    if rate is None:
        found = f"lr={held.group['lr']!r}" if "lr" in held.group else "no 'lr'"
        raise MetaKDError(
            f"group {held.number} of {type(held.optimizer).__name__} has {found}, but virtual steps need a number; set "
            "one (Hugging Face's Adafactor takes lr=1e-3, relative_step=False), or pass a torchopt "
            "GradientTransformation as inner="
        )
    return rate


def _bare(optimizer: Any) -> Any:
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
