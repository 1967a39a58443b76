"""Checks that a saved state fits the object that will load it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd.errors import MetaKDError


def check_state(saved: Any, own: Any, where: str, key: str = "") -> None:
    """Compare two nested states by keys, shapes, dtypes and kinds of values; `where` and `key` locate them in errors.

    Raises:
        MetaKDError: they differ; the message has the first keys, shapes or values that do.
    """
    if isinstance(own, Mapping):
        check_keys(saved, own, where, key)
        for name in own:
            check_state(saved[name], own[name], where, f"{key}.{name}" if key else str(name))
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or not (is_lazy(own) or saved.shape == own.shape):
            shape = tuple(saved.shape) if isinstance(saved, Tensor) else f"no tensor ({type(saved).__name__})"
            here = "a tensor" if is_lazy(own) else tuple(own.shape)
            raise MetaKDError(f"{where}'s {key!r} has shape {shape} in the saved state and {here} here; {CURE}")
        if saved.dtype != own.dtype or is_lazy(saved):
            raise MetaKDError(f"{where}'s {key!r} is {saved.dtype} in the saved state and {own.dtype} here; {CURE}")
    elif not _alike(saved, own):
        raise MetaKDError(f"{where}'s {key!r} is {saved!r:.80} in the saved state and {own!r:.80} here; {CURE}")


def check_balancer_state(
    saved: Any, own: Mapping[str, Any], weighting: nn.Module, learned: Mapping[str, Tensor]
) -> None:
    """Compare a saved balancer with this one's state `own`, except for the optimizer's.

    `learned` are the trainable parameters of terms.

    Raises:
        MetaKDError: they differ, or the saved one is damaged (negative numbers, NaN).
    """
    where = "the balancer"
    check_keys(saved, own, where, "")
    if saved["terms"] != own["terms"]:
        raise MetaKDError(f"{where} was saved with the terms {saved['terms']} and has {own['terms']} here; {CURE}")
    weights, pending = weighting.state_dict(), saved["pending"]
    if saved["weighting"] != {} or not any(map(is_lazy, filter(torch.is_tensor, weights.values()))):
        check_state(saved["weighting"], weights, where, "weighting")
    if "learned_terms" in own:
        check_state(saved["learned_terms"], own["learned_terms"], where, "learned_terms")
    if pending != {}:
        params = {**{name: p for name, p in weighting.named_parameters() if p.requires_grad}, **learned}
        sized = {name: saved["weighting"].get(name, p) if is_lazy(p) else p for name, p in params.items()}
        check_state(pending, sized, where, "pending")
    for name in ("calls", "pending_count"):
        if type(saved[name]) is not int or saved[name] < 0:
            raise MetaKDError(
                f"{where}'s {name!r} is {saved[name]!r} in the saved state, not a number of calls; {DAMAGED}"
            )
    if (saved["pending_count"] == 0) != (pending == {}):
        raise MetaKDError(
            f"{where}'s 'pending' does not hold the {saved['pending_count']} hypergradients that were counted in the "
            f"saved state; {DAMAGED}"
        )
    known = {**weights, **own.get("learned_terms", {})}
    for part in ("weighting", "learned_terms", "pending"):
        for name, value in saved.get(part, {}).items():
            if isinstance(value, Tensor) and value.isnan().any() and not known[name].isnan().any():
                raise MetaKDError(f"{where}'s '{part}.{name}' holds NaN in the saved state; {DAMAGED}")


def check_kind(saved: Any, own: Any, what: str) -> None:
    """Compare two sets of names; a version of torch may add names or lack some, but not both.

    Raises:
        MetaKDError: each set has names that the other lacks.
    """
    foreign, missing = saved - own, own - saved
    if foreign and missing:
        raise MetaKDError(f"{what} are of another kind in the saved state: {_difference(missing, foreign)}; {CURE}")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A block that loads a saved state; every error becomes a `MetaKDError`."""
    try:
        yield
    except MetaKDError:
        raise
    except Exception as error:
        raise MetaKDError(f"{what} cannot take the saved state ({type(error).__name__}: {error}); {CURE}") from error


def check_keys(saved: Any, own: Any, where: str, key: str, known: Any = ()) -> None:
    """Check that the saved mapping has the keys of `own`; keys in `known` are optional.

    Raises:
        MetaKDError: keys are missing or unknown; the message names them.
    """
    if not isinstance(saved, Mapping):
        raise MetaKDError(
            f"{where}'s {key or 'state'!r} is {type(saved).__name__} in the saved state, not a mapping; {CURE}"
        )
    missing, foreign = own.keys() - saved.keys(), saved.keys() - own.keys() - set(known)
    if missing or foreign:
        at = f" at {key!r}" if key else ""
        raise MetaKDError(f"the saved state does not fit {where}{at}: {_difference(missing, foreign)}; {CURE}")


def _difference(missing: Any, foreign: Any) -> str:
    return f"missing {sorted(missing, key=str)[:5]}, not known here {sorted(foreign, key=str)[:5]}"


def _alike(saved: Any, own: Any) -> bool:
    """Whether a saved value may replace one that is neither a mapping nor a tensor."""
    if own is None or saved is None:
        return True
    if isinstance(own, tuple | list):
        return isinstance(saved, tuple | list) and len(saved) == len(own) and all(map(_alike, saved, own))
    if isinstance(own, Number):
        return isinstance(saved, Number) or (isinstance(saved, Tensor) and saved.numel() == 1)
    return isinstance(saved, type(own))


CURE = "build the same parts with the same settings as when it was saved"
DAMAGED = "it must be damaged: load an earlier one"
