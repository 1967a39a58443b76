"""Replacements for transformations of TorchOpt 0.7.3 that are wrong or not differentiable at zero; states are alike."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt import pytree
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from torchopt.combine import chain_flat
from torchopt.transform.add_decayed_weights import _masked
from torchopt.transform.utils import tree_map_flat

from metakd.inner.repaired import own, repaired
from metakd.inner.updates import (
    adam_direction,
    clip_norm,
    mean,
    mean_square,
    momentum_step,
    over_root,
    radam_direction,
)

Mend = Callable[[GradientTransformation, dict[str, Any]], GradientTransformation]
"""(TorchOpt's transformation, the settings in its closure) -> its replacement."""


def mended(transformation: GradientTransformation) -> GradientTransformation:
    """The transformation of TorchOpt, or a chain of them, with its errors fixed; `repaired` says which."""
    if isinstance(transformation, ChainedGradientTransformation):
        return ChainedGradientTransformation(*(repaired(part) for part in transformation.transformations))
    update: Any = transformation.update
    settings = dict(inspect.getclosurevars(update).nonlocals)
    where = f"{update.__module__}.{update.__qualname__}".removesuffix(".<locals>.update_fn")
    if where == "torchopt.combine.chain_flat":
        return chain_flat(repaired(settings["inner"]))
    if where == "torchopt.transform.add_decayed_weights._masked":
        flat = settings["tree_map"] is tree_map_flat
        transformation = _masked(repaired(settings["inner"]), settings["mask"], already_flattened=flat)
    return own(_MENDED.get(where, _skipping_none)(transformation, settings))


class MomentumState(NamedTuple):
    """TorchOpt's `TraceState`, plus whether each buffer has seen a gradient yet."""

    trace: Any
    started: Any


def _momentum(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    rule = {name: settings[name] for name in ("momentum", "dampening", "nesterov")}

    def init(params: Any) -> MomentumState:
        trace = original.init(params).trace
        return MomentumState(trace, pytree.tree_map(lambda _: False, trace))

    def step(g: Tensor, buffer: Tensor, started: bool) -> tuple[Any, ...]:
        return *momentum_step(g, buffer if started else None, **rule), True

    each = _each(step)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        if not isinstance(state, MomentumState):
            # TorchOpt's own state does not say whether it has started; a started buffer is hardly all zero.
            state = MomentumState(state.trace, pytree.tree_map(lambda b: bool(b.any()), state.trace))
        return each(updates, state)

    return GradientTransformation(init, update)


def _scale_by_adam(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    b1, b2, epsilons = settings["b1"], settings["b2"], {name: settings[name] for name in ("eps", "eps_root")}

    def step(g: Tensor, mu: Tensor, nu: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        count, m, v = count + 1, mean(mu, g, b1), mean_square(nu, g, b2)
        t = count.to(torch.float64)
        return adam_direction(m, v, (1.0 - b1**t, 1.0 - b2**t), **epsilons), m, v, count

    return GradientTransformation(original.init, _each(step))


def _scale_by_radam(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    rule = {name: settings[name] for name in ("b1", "b2", "eps")}

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        def step(g: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
            m, v = mean(mu, g, rule["b1"]), mean_square(nu, g, rule["b2"])
            return radam_direction(m, v, state.t, **rule), m, v

        new, moments = _each(step)(updates, (state.mu, state.nu))
        return new, type(state)(*moments, state.t + 1)

    return GradientTransformation(original.init, update)


def _scale_by_rms(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def step(g: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
        v = mean_square(nu, g, settings["alpha"])
        return over_root(g, v, settings["eps"]), v

    return GradientTransformation(original.init, _each(step))


def _scale_by_stddev(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def step(g: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
        m, v = mean(mu, g, settings["alpha"]), mean_square(nu, g, settings["alpha"])
        return over_root(g, torch.addcmul(v, m, m, value=-1.0), settings["eps"]), m, v

    return GradientTransformation(original.init, _each(step))


def _scale_by_rss(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def step(g: Tensor, sum_of_squares: Tensor) -> tuple[Tensor, ...]:
        total = torch.addcmul(sum_of_squares, g, g)
        if settings["eps"]:
            return over_root(g, total, settings["eps"]), total
        nothing = total == 0  # TorchOpt's 0 / 0 is 0
        return torch.where(nothing, 0.0, over_root(g, torch.where(nothing, 1.0, total), 0.0)), total

    return GradientTransformation(original.init, _each(step))


def _each(step: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, Any]]:
    """Lift `step`, (gradient, its leaf of each state tree) -> new values, to whole trees; None keeps the state."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, tree = pytree.tree_flatten(updates, none_is_leaf=True)
        rows = zip(*map(_leaves_of, state), strict=True)
        moved = [(None, *row) if g is None else step(g, *row) for g, row in zip(gradients, rows, strict=True)]
        new, *parts = ([row[i] for row in moved] for i in range(1 + len(state)))
        trees = [tree.unflatten(part) for part in parts]
        return tree.unflatten(new), type(state)(*trees) if hasattr(state, "_fields") else tuple(trees)

    return update


def _clip(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, tree = pytree.tree_flatten(updates, none_is_leaf=True)
        return tree.unflatten(clip_norm(gradients, **settings)), state

    return GradientTransformation(original.init, update)


def _skipping_none(original: GradientTransformation, settings: dict[str, Any]) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, tree = pytree.tree_flatten(updates, none_is_leaf=True)
        if all(g is not None for g in gradients):
            return original.update(updates, state, params=params, inplace=inplace)
        values = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, _leaves_of(params), strict=True)]
        new, state = original.update(tree.unflatten(values), state, params=params, inplace=inplace)
        kept = [None if g is None else n for g, n in zip(gradients, _leaves_of(new), strict=True)]
        return tree.unflatten(kept), state

    return GradientTransformation(original.init, update)


def _leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, including None."""
    return pytree.tree_leaves(tree, none_is_leaf=True)


_MENDED: dict[str, Mend] = {
    "torchopt.transform.trace._trace": _momentum,
    "torchopt.transform.scale_by_adam._scale_by_adam": _scale_by_adam,
    "torchopt.transform.scale_by_adam._scale_by_accelerated_adam": _scale_by_adam,
    "torchopt.transform.scale_by_radam._scale_by_radam": _scale_by_radam,
    "torchopt.transform.scale_by_rms._scale_by_rms": _scale_by_rms,
    "torchopt.transform.scale_by_stddev._scale_by_stddev": _scale_by_stddev,
    "torchopt.transform.scale_by_rss._scale_by_rss": _scale_by_rss,
    "torchopt.clip.clip_grad_norm": _clip,
}
