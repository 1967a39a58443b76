"""Nested dicts of tensors as flat ones of real tensors, and back; names are joined by "/"."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.inner import GradientTransformation, own


def flatten(values: Any, what: str) -> dict[str, Any]:
    """The leaves of a nest of mappings by path; `what` names it in errors.

    Raises:
        MetaKDError: no mapping, an empty one, or two leaves with one path.

    Examples:
        >>> flatten({"layer": {"w": 1, "b": 2}}, "params")
        {'layer/w': 1, 'layer/b': 2}
    """
    if not isinstance(values, Mapping) or not values:
        found = "empty" if isinstance(values, Mapping) else f"a {type(values).__name__}"
        raise MetaKDError(f"{what} is {found}; give a dict of name -> tensor")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        parts = {f"{name}/{k}": v for k, v in flatten(value, f"{what}[{name!r}]").items()} if nested else {name: value}
        twice = flat.keys() & parts.keys()
        if twice:
            raise MetaKDError(f"{what} has two entries with the path {min(twice)!r}; rename one of them")
        flat.update(parts)
    return flat


def unflatten(flat: Mapping[str, Any], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nest shaped like `like` whose leaves are those of `flat`.

    Examples:
        >>> unflatten({"layer/w": 1, "layer/b": 2}, {"layer": {"w": None, "b": None}})
        {'layer': {'w': 1, 'b': 2}}
    """
    return {
        name: unflatten(flat, value, f"{prefix}{name}/") if isinstance(value, Mapping) else flat[f"{prefix}{name}"]
        for name, value in like.items()
    }


def as_given(flat: Mapping[str, Tensor], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nest shaped like `like`, complex where that is.

    Examples:
        >>> as_given({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor(1j)})
        {'w': tensor(1.+2.j)}
    """
    nest = unflatten(flat, like, prefix)
    for name, value in like.items():
        if isinstance(value, Mapping):
            nest[name] = as_given(flat, value, f"{prefix}{name}/")
        elif value.is_complex():
            nest[name] = torch.complex(*nest[name].unbind(-1))
    return nest


def real(value: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, in a last dimension of 2; a real one as it is."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def detached(values: Any, what: str) -> dict[str, Tensor]:
    """`flatten`, known to hold dense floating-point tensors, cut from autograd; complex ones by their real parts.

    Raises:
        MetaKDError: a leaf is something else.
    """
    flat = flatten(values, what)
    for name, value in flat.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise MetaKDError(
                f"{what}[{name!r}] is {kind}; gradients need floating-point tensors: convert it, or leave it out"
            )
        if value.layout != torch.strided:
            raise MetaKDError(f"{what}[{name!r}] is sparse ({value.layout}); give its .to_dense(), or its values alone")
    return {name: real(value.detach()) for name, value in flat.items()}


def on_flat(transformation: GradientTransformation, like: Mapping[str, Any]) -> GradientTransformation:
    """A transformation of nests shaped like `like`, taking flat dicts; its states stay those of the nests."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        nest, at = unflatten(updates, like), unflatten(params, like)
        new, state = transformation.update(nest, state, params=at, inplace=inplace)
        return flatten(new, "the updates"), state

    return own(GradientTransformation(transformation.init, update))
