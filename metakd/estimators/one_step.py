"""`OneStep`: the exact hypergradient of one inner step, without a second-order graph."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metakd.errors import MetaKDError
from metakd.estimators.problem import (
    Gradients,
    Hypergradient,
    Problem,
    answer,
    checked_scalar,
    gradients,
    leaves,
    second_order_gradients,
)
from metakd.inner import Params, apply


@dataclass(frozen=True)
class OneStep:
    r"""Exact hypergradient of K = 1 inner step.

    With $g = \nabla_\theta\, \mathrm{inner}(\theta, \phi)$, $\theta' = \theta + \mathrm{update}(g)$,
    $v = \nabla\, \mathrm{outer}(\theta')$ and $u = (\partial\, \mathrm{update} / \partial g)^\top v$,

    $$\frac{d\, \mathrm{outer}}{d \phi} = \nabla_\phi \big[ D_\theta\, \mathrm{inner}(\theta, \phi)[u] \big]
      + \frac{\partial\, \mathrm{outer}}{\partial \phi}.$$

    In forward mode the directional derivative $D_\theta$ is one forward pass with dual numbers: it serves all
    samples and all terms at once, and reverse mode then runs through the weight model only. In reverse mode it
    is a double backward, for models that lack forward-mode formulas. `"auto"` tries the first and falls back
    to the second, saying so once. Meta-Weight-Net (Shu et al., 2019) and BiKD (arXiv 2605.17839) compute the same
    quantity by double backward through a copy of the student.

    Args:
        mode: `"auto"`, `"forward"` or `"reverse"`.

    Raises:
        MetaKDError: when called with K other than 1, or in forward mode on a model without forward-mode formulas.

    Example:
        >>> import torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(3.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"] ** 2 / 2,
        ...     w, phi, [None], optimizer=torchopt.sgd(lr=0.1), estimator=OneStep())
        >>> result.gradient["phi"]  # theta' = (1 - 0.1 phi) w; d outer / d phi = -0.1 w theta'
        tensor(-0.7200)
    """

    mode: Literal["auto", "forward", "reverse"] = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "forward", "reverse"):
            raise MetaKDError(f"OneStep has the modes 'auto', 'forward' and 'reverse', not {self.mode!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        if len(problem.batches) != 1:
            raise MetaKDError(
                f"OneStep is the hypergradient of exactly one inner step, got {len(problem.batches)} batches; use "
                "estimators.Unroll() for K steps"
            )
        params, meta = leaves(problem.params), leaves(problem.meta_params)
        if problem.first_gradient is None:
            inner_loss = problem.inner(params, problem.meta_params, problem.batches[0])
            g = gradients(checked_scalar(inner_loss, "the inner loss"), params)
        else:
            g = problem.first_gradient()
        reached = {name: value.detach().requires_grad_() for name, value in g.items() if value is not None}
        ahead, state = apply(
            problem.optimizer,
            {name: reached.get(name) for name in g},
            problem.optimizer_state,
            problem.params,
        )
        lookahead = leaves(ahead)
        outer_loss = checked_scalar(problem.outer(lookahead, meta), "the outer loss")
        v_and_direct = gradients(outer_loss, {**_prefixed("theta", lookahead), **_prefixed("phi", meta)})
        v = {name: v_and_direct[f"theta.{name}"] for name in lookahead}
        direct = {name: v_and_direct[f"phi.{name}"] for name in meta}
        mixed = self._mixed(problem, meta, _pull_back(ahead, v, reached))
        total = {name: _sum(mixed[name], direct[name]) for name in meta}
        return answer(problem, outer_loss, total, ahead, state)

    def _mixed(self, problem: Problem, meta: Params, u: Params) -> Gradients:
        """grad_phi of the directional derivative of the inner loss along u."""
        if not u:
            return dict.fromkeys(meta)
        if self.mode == "reverse" or (self.mode == "auto" and problem.memory.get("forward_mode") is False):
            return _reverse(problem, meta, u)
        try:
            return _forward(problem, meta, u)
        except Exception as error:
            if not _lacks_forward_mode(error):
                raise
            if self.mode == "forward":
                raise MetaKDError(
                    "OneStep(mode='forward') met an operation without a forward-mode derivative "
                    f"({_first_line(error)}); use mode='auto' or 'reverse'"
                ) from error
            problem.memory["forward_mode"] = False
            warnings.warn(
                f"an operation of this model has no forward-mode derivative ({_first_line(error)}); OneStep uses "
                "reverse mode for it from now on, as exact, with more time and memory; OneStep(mode='reverse') "
                "silences this",
                stacklevel=2,
            )
            return _reverse(problem, meta, u)


def _pull_back(ahead: Params, v: Gradients, reached: Params) -> Params:
    """Return u = (d theta' / d g)^T v, for the parameters that have a gradient."""
    pairs = [(p, v[name]) for name, p in ahead.items() if v[name] is not None and p.requires_grad]
    if not pairs or not reached:
        return {}
    outputs, cotangents = zip(*pairs, strict=True)
    u = torch.autograd.grad(outputs, list(reached.values()), cotangents, allow_unused=True)
    return {name: value for name, value in zip(reached, u, strict=True) if value is not None}


class _NoGradStopsTangents(TorchFunctionMode):
    """A block where `torch.no_grad()` stops dual numbers too, as it stops reverse mode; by itself it lets them pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        return func(*args, **(kwargs or {}))


def _forward(problem: Problem, meta: Params, u: Params) -> Gradients:
    with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(True), _NoGradStopsTangents():
        dual = {name: forward_ad.make_dual(p, u[name]) if name in u else p for name, p in problem.params.items()}
        loss = problem.inner(dual, meta, problem.batches[0])
        slope = forward_ad.unpack_dual(loss).tangent
        return dict.fromkeys(meta) if slope is None else gradients(slope, meta)


def _reverse(problem: Problem, meta: Params, u: Params) -> Gradients:
    params = leaves({name: problem.params[name] for name in u})
    loss = problem.inner({**problem.params, **params}, meta, problem.batches[0])
    g = gradients(loss, params, create_graph=True)
    slopes = [(value * u[name]).sum() for name, value in g.items() if value is not None]
    return second_order_gradients(torch.stack(slopes).sum(), meta) if slopes else dict.fromkeys(meta)


def _lacks_forward_mode(error: BaseException) -> bool:
    texts = [str(e).lower() for e in _chain(error) if isinstance(e, NotImplementedError | RuntimeError)]
    return any("forward ad" in text or "forward mode" in text or "jvp" in text for text in texts)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    return str(list(_chain(error))[-1]).splitlines()[0][:160]


def _prefixed(prefix: str, values: Params) -> Params:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
