"""Nested dicts of tensors as flat dicts of real tensors, and back; names are joined by "/"."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.inner import GradientTransformation, own


def flatten(values: Any, what: str) -> dict[str, Any]:
    """The leaves of nested mappings by path; `what` names them in errors.

    Raises:
        MetaKDError: it is no mapping, it is empty, or two leaves have the same path.

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
    """The leaves of `flat` nested like `like`.

    Examples:
        >>> unflatten({"layer/w": 1, "layer/b": 2}, {"layer": {"w": None, "b": None}})
        {'layer': {'w': 1, 'b': 2}}
    """
    return {
        name: unflatten(flat, value, f"{prefix}{name}/") if isinstance(value, Mapping) else flat[f"{prefix}{name}"]
        for name, value in like.items()
    }


def as_given(flat: Mapping[str, Tensor], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`unflatten` with complex leaves where `like` has them.

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
    """A complex tensor as real and imaginary parts in a last dimension of 2; a real tensor unchanged."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def detached(values: Any, what: str) -> dict[str, Tensor]:
    """`flatten` to detached real tensors; raise if a leaf is no dense floating-point or complex tensor."""
    flat = flatten(values, what)
    for name, value in flat.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise MetaKDError(
                f"{what}[{name!r}] is {kind}; gradients need floating-point tensors: convert it, or leave it out"
            )
        if value.layout != torch.strided:
            raise MetaKDError(f"{what}[{name!r}] is sparse ({value.layout}); give its .to_dense(), or only its values")
    return {name: real(value.detach()) for name, value in flat.items()}


def on_flat(transformation: GradientTransformation, like: Mapping[str, Any]) -> GradientTransformation:
    """A transformation of flat dicts made from one of nests like `like`; its states keep their nesting."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        nest, at = unflatten(updates, like), unflatten(params, like)
        new, state = transformation.update(nest, state, params=at, inplace=inplace)
        return flatten(new, "the updates"), state

    return own(GradientTransformation(transformation.init, update))
