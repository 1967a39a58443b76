"""`hypergradient`: the pure function under the balancer, for any bilevel problem."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.estimators.adjoint import Adjoint
from metakd.estimators.problem import Estimator, Hypergradient, Problem
from metakd.inner import GradientTransformation, Params, repaired


def hypergradient(
    inner: Callable[[Params, Params, Any], Tensor],
    outer: Callable[[Params, Params], Tensor],
    params: Params,
    meta_params: Params,
    batches: Sequence[Any],
    *,
    optimizer: GradientTransformation,
    optimizer_state: Any = None,
    estimator: Estimator | None = None,
) -> Hypergradient:
    r"""Gradient of an outer loss in meta-parameters, through K = len(batches) inner optimizer steps.

    $$\frac{d}{d\phi}\, \mathrm{outer}(\theta_K(\phi), \phi), \qquad
      \theta_{t+1} = \theta_t + \mathrm{update}\big(\nabla_\theta\, \mathrm{inner}(\theta_t, \phi, b_t),\, s_t\big).$$

    Nothing that is passed in is changed.

    Args:
        inner: (params, meta_params, batch) -> scalar, a pure function.
        outer: (params, meta_params) -> scalar, a pure function.
        params: theta_0 by name.
        meta_params: phi by name.
        batches: one for each inner step, handed to `inner` as they are.
        optimizer: a TorchOpt `GradientTransformation`; what TorchOpt gets wrong in its own is mended on the way
            (`metakd.inner.repaired`).
        optimizer_state: the state to start from; None for `optimizer.init(params)`.
        estimator: how to compute it; None for `Adjoint()`, exact for any K.

    Returns:
        `Hypergradient(outer_loss, gradient, params, optimizer_state)`, all detached.

    Raises:
        MetaKDError: no batches, parameters that are not floating-point tensors, a loss that is not a finite
            scalar, a hypergradient that is missing, all zero, NaN or infinite.

    Example:
        >>> import torchopt
        >>> theta, phi = {"x": torch.tensor([1.0, 2.0])}, {"target": torch.tensor([0.0, 0.0])}
        >>> result = hypergradient(
        ...     inner=lambda p, m, batch: ((p["x"] - m["target"]) ** 2).sum() / 2,
        ...     outer=lambda p, m: (p["x"] ** 2).sum() / 2,
        ...     params=theta, meta_params=phi, batches=range(3), optimizer=torchopt.sgd(lr=0.5))
        >>> result.gradient["target"]  # theta_3 = x / 8 + 7/8 target
        tensor([0.1094, 0.2188])
    """
    problem = build_problem(inner, outer, params, meta_params, batches, optimizer, optimizer_state)
    with torch.enable_grad():
        return (estimator or Adjoint())(problem)


def build_problem(
    inner: Callable[[Params, Params, Any], Tensor],
    outer: Callable[[Params, Params], Tensor],
    params: Params,
    meta_params: Params,
    batches: Sequence[Any],
    optimizer: GradientTransformation,
    optimizer_state: Any = None,
) -> Problem:
    """Check the arguments of `hypergradient` and put them together; the optimizer comes out repaired."""
    if not isinstance(optimizer, GradientTransformation):
        raise MetaKDError(
            f"optimizer must be a torchopt GradientTransformation such as torchopt.sgd(lr=0.1), got "
            f"{type(optimizer).__name__}; torch.optim optimizers go to "
            "BilevelLossBalancer(optimizer=..., inner='mirror')"
        )
    batches = list(batches)
    if not batches:
        raise MetaKDError("batches is empty: its length is the number of inner steps, so give at least one")
    theta, phi = _detached(params, "params"), _detached(meta_params, "meta_params")
    optimizer = repaired(optimizer)
    state = optimizer.init(theta) if optimizer_state is None else optimizer_state
    return Problem(inner, outer, theta, phi, batches, optimizer, state)


def _detached(values: Params, what: str) -> Params:
    if not isinstance(values, Mapping) or not values:
        found = "empty" if isinstance(values, Mapping) else f"a {type(values).__name__}"
        raise MetaKDError(f"{what} is {found}; give a dict of name -> tensor")
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise MetaKDError(f"{what}[{name!r}] is {kind}; gradients need floating-point tensors")
    return {name: value.detach() for name, value in values.items()}
