"""`Adjoint`: the exact hypergradient of K inner steps with the graph of one step in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakd.batch import map_tensors, tensors
from metakd.errors import MetaKDError
from metakd.estimators.mixed import Mode, mixed_product
from metakd.estimators.problem import (
    Gradients,
    Hypergradient,
    Problem,
    answer,
    checked_scalar,
    gradients,
    in_both,
    leaves,
    second_order_gradients,
)
from metakd.inner import Params, apply


@dataclass(frozen=True)
class Adjoint:
    r"""Exact hypergradient of any number of inner steps; memory does not grow with their graphs.

    A first sweep takes the K steps without second-order graphs and keeps $\theta_t$ and the optimizer's state $s_t$.
    Then the adjoints $\lambda_\theta = \nabla_{\theta_t}\, \mathrm{outer}$ and $\lambda_s = \nabla_{s_t}\,
    \mathrm{outer}$ walk back: pulled through the update they give the cotangent $u_t$ of the gradient $g_t$, and with
    step t's graph built anew, alone,

    $$\lambda_\theta \leftarrow \Big(\frac{\partial\, \theta_{t+1}}{\partial\, \theta_t}\Big)^{\!\top}
      \Big|_{g_t}\! \lambda + \nabla^2_{\theta\theta}\, \mathrm{inner}\; u_t, \qquad
      \frac{d\, \mathrm{outer}}{d \phi} \mathrel{+}= \nabla^2_{\phi\theta}\, \mathrm{inner}\; u_t.$$

    The first step needs the mixed product alone: that is `OneStep`'s forward-mode pass. Source: the low-memory reverse
    of Franceschi et al. (2017) and MixFlow-MG (arXiv 2505.00793). Ours differs in starting from the real optimizer's
    state, in its groups and skipped parameters, and in replaying random numbers and buffers through the balancer's
    pure losses. The products are reverse over reverse. `Unroll` gives the same numbers to rounding.

    Raises:
        MetaKDError: when called without a batch, or where the model has no double backward (K > 1).

    Example:
        >>> import torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=Adjoint())
        >>> result.gradient["phi"]  # theta_2 = (1 - 0.1 phi)^2; d theta_2 / d phi = -0.2 (1 - 0.1 phi)
        tensor(-0.1600)
    """

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        return walk_back(problem, len(problem.batches))


class _Adjoints(NamedTuple):
    """Gradients of the outer loss in theta_t (by name) and in the floating-point tensors of the state (in order)."""

    params: Params
    state: list[Tensor]


class _Kept(NamedTuple):
    """A step of the first sweep: where it started, and its gradient where that is not computed again anyway."""

    params: Params
    state: Any
    gradient: Gradients | None


Products = Callable[[Problem, Params, Params, Any, Params], tuple[Gradients, Gradients]]


def walk_back(
    problem: Problem, horizon: int, mode: Mode = "auto", *, products: Products | None = None
) -> Hypergradient:
    """The hypergradient through the last `horizon` of the inner steps; through all of them it is exact.

    Args:
        problem: the bilevel problem.
        horizon: how many steps to walk back.
        mode: of the mixed product at the first of them.
        products: (problem, params, meta, batch, u) -> the products of u with the inner loss's second derivatives, in
            params and in meta; None for the exact ones.
    """
    count = len(problem.batches)
    if not count:
        raise MetaKDError("there are no batches; their number is the number of inner steps, so give at least one")
    first = max(count - horizon, 0)
    kept: list[_Kept] = []
    params, state = problem.params, problem.optimizer_state
    for t in range(count):
        gradient = _inner_gradient(problem, params, t)
        if t >= first:
            kept.append(_Kept(params, state, None if products is None and t > first else gradient))
        with torch.no_grad():
            params, state = apply(problem.optimizer, gradient, state, params)
    ahead, meta = leaves(params), leaves(problem.meta_params)
    outer_loss = checked_scalar(problem.outer(ahead, meta), "the outer loss")
    v, total = in_both(outer_loss, ahead, meta)
    adjoints = _Adjoints(
        {name: _or_zero(v[name], p) for name, p in params.items()},
        [torch.zeros_like(t) for t in _floats(state)],
    )
    if all(value is None for value in v.values()):
        kept.clear()  # the outer loss does not feel the inner steps
    for t in reversed(range(first, first + len(kept))):
        adjoints, mixed = _step_back(problem, t, kept.pop(), adjoints, meta, products or mixed_alone(mode))
        total = {name: _sum(total[name], mixed[name]) for name in meta}
    return answer(problem, outer_loss, total, params, state)


def _inner_gradient(problem: Problem, params: Params, t: int) -> Gradients:
    if t == 0 and problem.first_gradient is not None:
        return problem.first_gradient()
    theta = leaves(params)
    loss = problem.inner(theta, problem.meta_params, problem.batches[t])
    return gradients(checked_scalar(loss, f"the inner loss of step {t}"), theta)


def _step_back(
    problem: Problem, t: int, kept: _Kept, adjoints: _Adjoints, meta: Params, products: Products
) -> tuple[_Adjoints, Gradients]:
    """The adjoints before step t from those after it, and what the step adds to the hypergradient."""
    batch = problem.batches[t]
    if kept.gradient is not None:
        before, u = _through_update(problem, kept, kept.gradient, adjoints)
        in_params, in_meta = products(problem, kept.params, meta, batch, u)
        return _plus(before, in_params), in_meta
    theta = leaves(kept.params)
    loss = problem.inner(theta, meta, batch)
    gradient = gradients(loss, theta, create_graph=True)
    before, u = _through_update(problem, kept, gradient, adjoints)
    slopes = [(g * u[name]).sum() for name, g in gradient.items() if g is not None and name in u]
    if not slopes:
        return before, dict.fromkeys(meta)
    in_params, in_meta = in_both(torch.stack(slopes).sum(), theta, meta, second_order_gradients)
    return _plus(before, in_params), in_meta


def mixed_alone(mode: Mode) -> Products:
    """No product in the parameters: nothing before the first step asks for it."""
    return lambda problem, params, meta, batch, u: ({}, mixed_product(problem, params, meta, batch, u, mode=mode))


def _plus(adjoints: _Adjoints, products: Gradients) -> _Adjoints:
    present = {name: product for name, product in products.items() if product is not None}
    params = {name: p + present[name] if name in present else p for name, p in adjoints.params.items()}
    return _Adjoints(params, adjoints.state)


def _through_update(
    problem: Problem, kept: _Kept, gradient: Gradients, adjoints: _Adjoints
) -> tuple[_Adjoints, Params]:
    """Pull the adjoints back through one update of the optimizer; also the cotangent u of the gradient."""
    theta = leaves(kept.params)
    g = leaves({name: value for name, value in gradient.items() if value is not None})
    state = map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, kept.state)
    ahead, after = apply(problem.optimizer, {name: g.get(name) for name in theta}, state, theta)
    pairs = [*zip(ahead.values(), adjoints.params.values(), strict=True)]
    pairs += zip(_floats(after), adjoints.state, strict=True)
    outputs, cotangents = zip(*((new, adjoint) for new, adjoint in pairs if new.requires_grad), strict=True)
    old = _floats(state)
    found = torch.autograd.grad(outputs, [*theta.values(), *old, *g.values()], cotangents, allow_unused=True)
    in_params, in_state, in_gradient = found[: len(theta)], found[len(theta) : -len(g) or None], found[-len(g) :]
    before = _Adjoints(
        {name: _or_zero(a, p) for (name, p), a in zip(theta.items(), in_params, strict=True)},
        [_or_zero(a, s) for s, a in zip(old, in_state, strict=True)],
    )
    u = {name: a for name, a in zip(g, in_gradient, strict=True) if a is not None} if g else {}
    return before, u


def _floats(state: Any) -> list[Tensor]:
    return [t for t in tensors(state) if t.is_floating_point()]


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
