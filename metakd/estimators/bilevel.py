"""`hypergradient`: the pure function below the balancer, for any bilevel problem."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metakd._basics.rng import RngState
from metakd.batch import tensors
from metakd.estimators.adjoint import Adjoint
from metakd.estimators.agreement import reject_impure, reject_other_hypergradient
from metakd.estimators.build import Nest, Optimizer, build_problem
from metakd.estimators.estimate import checked_estimator, estimate, is_exact, solved
from metakd.estimators.memory import Memory
from metakd.estimators.nested import as_given
from metakd.estimators.problem import Estimator, Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.unroll import Unroll

__all__ = ["Nest", "Optimizer", "build_problem", "hypergradient"]


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
    verify: bool | None = None,
) -> Hypergradient:
    r"""Gradient of an outer loss in meta-parameters, through K = len(batches) inner optimizer steps.

    $$\frac{d}{d\phi}\, \mathrm{outer}(\theta_K(\phi), \phi), \qquad
      \theta_{t+1} = \theta_t + \mathrm{update}_\phi\big(\nabla_\theta\, \mathrm{inner}(\theta_t, \phi, b_t),\,
      s_t\big),$$

    with the batch $b_t$ and the optimizer's state $s_t$ of step t. It also computes the gradient in $\theta_0$, to
    learn where the steps begin. The arguments stay unchanged.

    The losses may draw random numbers from torch's, Python's and NumPy's global generators. A step draws the same ones
    whenever an estimator evaluates it; afterwards the generators are as if each step and each outer loss ran once.
    Tensors may be complex: estimators and optimizers (and the optimizer's state) see their real and imaginary parts in
    a last dimension of 2.

    Args:
        inner: (params, meta_params, batch) -> scalar, a pure function apart from random numbers.
        outer: (params, meta_params) -> scalar, also pure; with `outer_batches` (params, meta_params, batch).
        params: theta_0 by name; dicts may be nested, and the losses and the result have the same nesting.
        meta_params: phi by name, possibly nested; `{}` to ask for the gradient in theta_0 only.
        batches: one for each inner step, passed to `inner` unchanged.
        optimizer: a TorchOpt `GradientTransformation`, or a function of the meta-parameters that returns one, if they
            are its learning rate or another setting: `lambda m: torchopt.sgd(lr=m["lr"])`. Errors of TorchOpt's own
            optimizers are repaired (`metakd.inner.repaired`).
        optimizer_state: the state to start from; None for `optimizer.init(params)`.
        outer_batches: the outer loss is the mean over these, with one batch's graph in memory at a time.
        estimator: how to compute it; None for `Adjoint()`, exact for any K.
        verify: None compares an explicit forward mode, which could be silently wrong, with reverse mode. True also
            evaluates the losses twice and compares an estimator that is exact for K steps with `Unroll` (`Unroll` with
            `Adjoint`), which takes at least twice the time. False compares nothing.

    Returns:
        `Hypergradient(outer_loss, gradient, params, optimizer_state, params_gradient)`, detached.

    Raises:
        MetaKDError: no batches, parameters that are not floating-point tensors, a loss that is not a finite
            scalar, a hypergradient that is NaN or infinite, an outer loss without connection to the
            meta-parameters, or a failed comparison.

    Examples:
        >>> import torchopt
        >>> theta, phi = {"x": torch.tensor([1.0, 2.0])}, {"target": torch.tensor([0.0, 0.0])}
        >>> result = hypergradient(
        ...     inner=lambda p, m, batch: ((p["x"] - m["target"]) ** 2).sum() / 2,
        ...     outer=lambda p, m: (p["x"] ** 2).sum() / 2,
        ...     params=theta, meta_params=phi, batches=range(3), optimizer=torchopt.sgd(lr=0.5))
        >>> result.gradient["target"]  # theta_3 = x / 8 + 7/8 target
        tensor([0.1094, 0.2188])
        >>> result.params_gradient["x"]
        tensor([0.0156, 0.0312])
    """
    estimator = checked_estimator(Adjoint() if estimator is None else estimator)
    problem = replace(
        build_problem(
            inner, outer, params, meta_params, batches, optimizer, optimizer_state, outer_batches=outer_batches
        ),
        memory=Memory(compare=verify is not False, compare_products=bool(verify)),
        wants_params_gradient=True,
    )
    start = RngState.capture({t.device for t in tensors([problem.params, problem.meta_params, problem.batches])})
    try:
        with torch.enable_grad():
            found = estimate(estimator, problem)
            if verify:
                reject_impure(problem)
                _compare(problem, estimator, found)
    except BaseException:
        start.restore()
        raise
    in_start = found.params_gradient
    return found._replace(
        gradient=as_given(found.gradient, meta_params),
        params=as_given(found.params, params),
        params_gradient=None if in_start is None else as_given(in_start, params),
    )


def _compare(problem: Problem, estimator: Estimator, found: Hypergradient) -> None:
    """Raise if an exact estimator's hypergradient differs from another exact one's."""
    if not is_exact(estimator, len(problem.batches)):
        return
    other = Adjoint() if estimator == Unroll() else Unroll()
    expected = estimate(other, solved(estimator, problem))
    reject_other_hypergradient(found.gradient, expected.gradient, (estimator, other))
    if found.params_gradient is not None and expected.params_gradient is not None:
        reject_other_hypergradient(found.params_gradient, expected.params_gradient, (estimator, other))
