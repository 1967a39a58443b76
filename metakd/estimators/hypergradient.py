"""`hypergradient`: the pure function under the balancer, for any bilevel problem."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.estimators.adjoint import Adjoint
from metakd.estimators.estimate import estimate
from metakd.estimators.nested import detached, on_flat, unflatten
from metakd.estimators.problem import NO_BATCHES, Estimator, Hypergradient, Outer, Problem
from metakd.inner import GradientTransformation, repaired

Nest = Mapping[str, Any]
"""A dict of name -> tensor, or of name -> such a dict."""

Optimizer = GradientTransformation | Callable[[Any], GradientTransformation]


def hypergradient(
    inner: Callable[[Any, Any, Any], Tensor],
    outer: Callable[..., Tensor],
    params: Nest,
    meta_params: Nest,
    batches: Sequence[Any],
    *,
    optimizer: Optimizer,
    optimizer_state: Any = None,
    outer_batches: Sequence[Any] | None = None,
    estimator: Estimator | None = None,
) -> Hypergradient:
    r"""Gradient of an outer loss in meta-parameters, through K = len(batches) inner optimizer steps.

    $$\frac{d}{d\phi}\, \mathrm{outer}(\theta_K(\phi), \phi), \qquad
      \theta_{t+1} = \theta_t + \mathrm{update}_\phi\big(\nabla_\theta\, \mathrm{inner}(\theta_t, \phi, b_t),\,
      s_t\big),$$

    with the batch $b_t$ and the optimizer's state $s_t$ of step t. Nothing that is passed in is changed.

    Args:
        inner: (params, meta_params, batch) -> scalar, a pure function.
        outer: (params, meta_params) -> scalar, a pure function; with `outer_batches` (params, meta_params, batch).
        params: theta_0 by name; dicts may be nested, and the losses and the result see them nested alike.
        meta_params: phi by name, likewise.
        batches: one for each inner step, handed to `inner` as they are.
        optimizer: a TorchOpt `GradientTransformation`, or a function of the meta-parameters that returns one where
            they are its learning rate or another of its numbers, as in `lambda m: torchopt.sgd(lr=m["lr"])`. What
            TorchOpt gets wrong in its own is mended on the way (`metakd.inner.repaired`).
        optimizer_state: the state to start from; None for `optimizer.init(params)`.
        outer_batches: the outer loss is the mean over these, with one batch's graph in memory at a time.
        estimator: how to compute it; None for `Adjoint()`, exact for any K.

    Returns:
        `Hypergradient(outer_loss, gradient, params, optimizer_state)`, all detached.

    Raises:
        MetaKDError: no batches, parameters that are not floating-point tensors, a loss that is not a finite
            scalar, a hypergradient that is missing, all zero, NaN or infinite.

    Examples:
        >>> import torchopt
        >>> theta, phi = {"x": torch.tensor([1.0, 2.0])}, {"target": torch.tensor([0.0, 0.0])}
        >>> result = hypergradient(
        ...     inner=lambda p, m, batch: ((p["x"] - m["target"]) ** 2).sum() / 2,
        ...     outer=lambda p, m: (p["x"] ** 2).sum() / 2,
        ...     params=theta, meta_params=phi, batches=range(3), optimizer=torchopt.sgd(lr=0.5))
        >>> result.gradient["target"]  # theta_3 = x / 8 + 7/8 target
        tensor([0.1094, 0.2188])
    """
    problem = build_problem(
        inner, outer, params, meta_params, batches, optimizer, optimizer_state, outer_batches=outer_batches
    )
    with torch.enable_grad():
        found = estimate(estimator or Adjoint(), problem)
    return found._replace(gradient=unflatten(found.gradient, meta_params), params=unflatten(found.params, params))


def build_problem(
    inner: Callable[[Any, Any, Any], Tensor],
    outer: Callable[..., Tensor],
    params: Nest,
    meta_params: Nest,
    batches: Sequence[Any],
    optimizer: Optimizer,
    optimizer_state: Any = None,
    *,
    outer_batches: Sequence[Any] | None = None,
) -> Problem:
    """Check the arguments of `hypergradient` and put them together: names flat, the optimizer repaired."""
    batches = list(batches)
    if not batches:
        raise MetaKDError(NO_BATCHES)
    theta, phi = detached(params, "params"), detached(meta_params, "meta_params")

    def outer_on(*batch: Any) -> Outer:
        return lambda p, m: outer(unflatten(p, params), unflatten(m, meta_params), *batch)

    outers = [outer_on()] if outer_batches is None else [outer_on(batch) for batch in outer_batches]
    if not outers:
        raise MetaKDError("outer_batches is empty; give at least one batch, or None for an outer loss without batches")

    def nested_inner(p: Any, m: Any, batch: Any) -> Tensor:
        return inner(unflatten(p, params), unflatten(m, meta_params), batch)

    def optimizer_at(m: Any) -> GradientTransformation:
        found = optimizer(unflatten(m, meta_params)) if callable(optimizer) else optimizer
        if not isinstance(found, GradientTransformation):
            raise MetaKDError(
                "optimizer must be a torchopt GradientTransformation such as torchopt.sgd(lr=0.1), or a function "
                f"meta_params -> GradientTransformation, got {type(found).__name__}; torch.optim optimizers go to "
                "BilevelLossBalancer(optimizer=..., inner='mirror')"
            )
        return on_flat(repaired(found), params)

    start = optimizer_at(phi)
    state = start.init(unflatten(theta, params)) if optimizer_state is None else optimizer_state
    at = optimizer_at if callable(optimizer) else lambda _: start
    return Problem(nested_inner, outers, theta, phi, batches, at, state)
