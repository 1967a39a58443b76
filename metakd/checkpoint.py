"""Whether a saved state fits the object that is to load it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metakd.errors import MetaKDError


def check_state(saved: Any, own: Mapping[str, Any], where: str) -> None:
    """Compare the keys, the tensors' shapes and the kinds of values of two nested states.

    Args:
        saved: the state that was loaded.
        own: the state of the object that is to take it, as its `state_dict()` gives it.
        where: what the object is called in the message.

    Raises:
        MetaKDError: naming the first keys, or the key and the two shapes or values, that differ.

    Example:
        >>> import torch
        >>> check_state({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "the balancer")
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: the balancer's 'w' has shape (2,) in the saved state and (3,) here; ...
    """
    _check(saved, own, where, "")
    if weights := own.get("weighting"):
        pending = saved["pending"]
        _check(pending, {name: weights.get(name) for name in pending}, where, "pending")


def _check(saved: Any, own: Any, where: str, key: str) -> None:
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise MetaKDError(
                f"{where}'s {key or 'state'!r} is {type(saved).__name__} in the saved state, not a mapping; {_CURE}"
            )
        # An optimizer's state is empty before its first step, a weight model's before its lazy layers know their size.
        if key in ("weighting", "weighting_optimizer.state", "pending") and not (saved and own):
            return
        missing, foreign = sorted(set(own) - set(saved), key=str), sorted(set(saved) - set(own), key=str)
        if missing or foreign:
            raise MetaKDError(
                f"the saved state does not fit {where}{f' at {key!r}' if key else ''}: missing {missing[:5]}, "
                f"not known here {foreign[:5]}; {_CURE}"
            )
        for name in own:
            _check(saved[name], own[name], where, f"{key}.{name}" if key else str(name))
    elif isinstance(own, Tensor):
        shape = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        if shape != tuple(own.shape):
            raise MetaKDError(
                f"{where}'s {key!r} has shape {shape} in the saved state and {tuple(own.shape)} here; {_CURE}"
            )
    elif key.endswith("param_groups"):
        sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
        if sizes[0] != sizes[1]:
            raise MetaKDError(
                f"{where}'s {key!r} hold {sizes[0]} parameters in the saved state and {sizes[1]} here; {_CURE}"
            )
    elif key == "terms" and list(saved) != own:
        raise MetaKDError(f"{where} was saved with the terms {list(saved)} and has {own} here; {_CURE}")
    elif own is None or (isinstance(own, int) and not isinstance(saved, int)):
        raise MetaKDError(f"{where}'s {key!r} is {saved!r} in the saved state, which has no meaning here; {_CURE}")


_CURE = "build the balancer with the same terms, weight model and optimizer as when it was saved"
