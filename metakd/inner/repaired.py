"""TorchOpt's transformations with the errors of TorchOpt 0.7.3 fixed."""

import inspect
from typing import Any

import torch
from torchopt import pytree
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from torchopt.combine import chain_flat
from torchopt.transform.add_decayed_weights import _masked
from torchopt.transform.utils import tree_map_flat

from metakd.inner.mended import MENDED, leaves_of


def repaired(transformation: GradientTransformation) -> GradientTransformation:
    """Fix the errors of TorchOpt 0.7.3 in a transformation; states keep their layout.

    Fixes `trace` (a closure, not the state, knew whether a buffer had started), `scale_by_adam` (bias correction in
    float32, NaN derivatives at zero gradients, the approximate fused operator), `scale_by_rms`, `scale_by_stddev`,
    `scale_by_rss` and `scale_by_radam` (NaN derivatives at zero gradients) and `clip_grad_norm` (autograd treated the
    clip factor as a constant), anywhere in a chain. RMSprop, Adagrad and RAdam are made of these. A gradient of None
    gives no update. In these transformations it leaves the state unchanged; for the state of all others it counts as
    zero.

    Args:
        transformation: TorchOpt's, or a chain of them.

    Returns:
        The repaired transformation; one that needs no repair is returned unchanged.

    Examples:
        >>> import torchopt
        >>> from metakd.inner import apply
        >>> adam = repaired(torchopt.adam(lr=0.1))
        >>> theta = {"w": torch.zeros(2, dtype=torch.float64)}
        >>> g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> new, _ = apply(adam, {"w": g}, adam.init(theta), theta)
        >>> torch.autograd.grad(new["w"].sum(), g)[0].isfinite().all()
        tensor(True)
    """
    if isinstance(transformation, ChainedGradientTransformation):
        return ChainedGradientTransformation(*(repaired(part) for part in transformation.transformations))
    update = transformation.update
    if getattr(update, "_metakd_own", False) or not inspect.isfunction(update):
        return transformation
    settings = dict(inspect.getclosurevars(update).nonlocals)
    where = f"{update.__module__}.{update.__qualname__}".removesuffix(".<locals>.update_fn")
    if where == "torchopt.combine.chain_flat":
        return chain_flat(repaired(settings["inner"]))
    if where == "torchopt.transform.add_decayed_weights._masked":
        flat = settings["tree_map"] is tree_map_flat
        transformation = _masked(repaired(settings["inner"]), settings["mask"], already_flattened=flat)
    return own(MENDED.get(where, _skipping_none)(transformation, settings))


def own(transformation: GradientTransformation) -> GradientTransformation:
    """Mark a transformation as correct: it needs no repair and handles gradients of None.

    Args:
        transformation: your own; for a parameter without a gradient `update` gets None and returns None.

    Returns:
        The same transformation.

    Examples:
        >>> def update(gradients, state, *, params=None, inplace=True):
        ...     return {name: None if g is None else -0.1 * g.sign() for name, g in gradients.items()}, state
        >>> signs = own(GradientTransformation(lambda params: (), update))
        >>> repaired(signs) is signs
        True
    """
    transformation.update._metakd_own = True  # type: ignore[attr-defined]
    return transformation


def _skipping_none(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, tree = pytree.tree_flatten(updates, none_is_leaf=True)
        if all(g is not None for g in gradients):
            return original.update(updates, state, params=params, inplace=inplace)
        values = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves_of(params), strict=True)]
        new, state = original.update(tree.unflatten(values), state, params=params, inplace=inplace)
        kept = [None if g is None else n for g, n in zip(gradients, leaves_of(new), strict=True)]
        return tree.unflatten(kept), state

    return GradientTransformation(original.init, update)
