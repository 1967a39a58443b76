"""The bilevel problem an estimator is given."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metakd._autodiff import Gradients, added, dense, gradients, joint_gradients, leaves, with_zeros
from metakd._basics.checks import check
from metakd.errors import MetaKDError
from metakd.estimators.memory import Memory
from metakd.estimators.result import Hypergradient
from metakd.inner import GradientTransformation, Params, apply

Inner = Callable[[Params, Params, Any], Tensor]
Outer = Callable[[Params, Params], Tensor]
Mean = Callable[[Gradients, Params, str], Gradients]
"""(values, like, what) -> their mean over processes, with the names of `like`.

Missing names count as zero; `what` names the values in errors."""


def unchanged(values: Gradients, like: Params, what: str) -> Gradients:
    """The mean over one process: the values themselves."""
    return values


Norm = Callable[[Tensor, str], Tensor]
"""(norm of this process's part of params, what) -> the norm over all processes."""


def whole(of_part: Tensor, what: str) -> Tensor:
    """The norm where this process holds all of params."""
    return of_part


class WeightedLosses(NamedTuple):
    r"""Says that $\mathrm{inner}(\theta, \phi, b) = \frac{1}{B} \sum_{ik} w_{ik}(\phi, b)\, \ell_{ik}(\theta, b)$.

    The meta-parameters then only multiply the losses and their tangents, so forward mode is exact. Those in `learned`
    may also act on the losses, $\ell_{ik}(\theta, \phi, b)$, after the student's own operations.

    Attributes:
        losses: (params, batch) -> (B, M); with `learned` called with meta_params= and via= as well. A `via` that is not
            None takes the place of terms(outputs) as via(terms, outputs), where the terms act on a model's outputs.
        weights: (meta_params, batch) -> (B, M).
        names: of the M terms.
        given: the meta-parameter that is the weights, if one is.
        learned: names of the meta-parameters that the losses depend on: the terms' own.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> weighted = WeightedLosses(lambda p, b: (p["w"] * x)[:, None], lambda m, b: m["phi"][:, None], ["linear"])
        >>> weighted.losses({"w": torch.tensor(3.0)}, None).shape
        torch.Size([2, 1])
    """

    losses: Callable[..., Tensor]
    weights: Callable[[Params, Any], Tensor]
    names: Sequence[str]
    given: str | None = None
    learned: Sequence[str] = ()

    def at(self, meta_params: Params, via: Any = None) -> "WeightedLosses":
        """The same with losses (params, batch) -> (B, M) at these meta-parameters."""
        return self._replace(losses=partial(self.losses, meta_params=meta_params, via=via)) if self.learned else self


class Step(NamedTuple):
    """The batch of an inner step and its number: where a step begins depends on the one before.

    Examples:
        >>> Step.all_of(["a", "b"])[1]
        Step(number=1, batch='b')
    """

    number: int
    batch: Any

    @classmethod
    def all_of(cls, batches: Iterable[Any]) -> "list[Step]":
        """Number the batches."""
        return [cls(t, batch) for t, batch in enumerate(batches)]


@dataclass(frozen=True)
class Problem:
    """min over phi of outer(theta_K, phi), theta_{t+1} = theta_t + update(grad inner(theta_t, phi, batch_t)).

    Attributes:
        inner: (params, meta_params, batch) -> scalar; a pure function.
        outers: (params, meta_params) -> scalar, one or several; the outer loss is their mean.
        params: theta_0, detached.
        meta_params: phi, detached.
        batches: one for each step, passed to `inner`; their number is K. A `Step` also has the step's number.
        optimizer: meta_params -> the differentiable inner optimizer.
        optimizer_state: the state it starts from.
        first_gradient: names -> grad inner(theta_0, phi, batches[0]) in these parameters, if the caller knows it
            already; None to compute it from `inner`.
        first_inner: phi -> inner(theta_0, phi, batches[0]), if the caller knows it already.
        memory: what estimators learn about this problem, such as that its model has no forward-mode derivatives.
        mean: averages gradients in params over processes, each of which has its part of the losses. The hypergradient
            that an estimator returns stays this process's part.
        norm: joins the norms of the processes' parts, if each has only a part of params.
        weighted: the parts of the inner loss, if it is a weighted mean of losses.
        wants_params_gradient: whether to compute the gradient in theta_0, too.

    Examples:
        >>> import torchopt
        >>> sgd, start = torchopt.sgd(lr=0.1), {"x": torch.tensor(1.0)}
        >>> problem = Problem(lambda p, m, batch: m["w"] * p["x"] ** 2, [lambda p, m: p["x"]], start,
        ...                   {"w": torch.tensor(0.5)}, [None], lambda m: sgd, sgd.init(start))
        >>> problem.sweep()[0]
        {'x': tensor(0.9000)}
    """

    inner: Inner
    outers: Sequence[Outer]
    params: Params
    meta_params: Params
    batches: Sequence[Any]
    optimizer: Callable[[Params], GradientTransformation]
    optimizer_state: Any
    first_gradient: Callable[[Collection[str]], Gradients] | None = None
    first_inner: Callable[[Params], Tensor] | None = None
    memory: Memory = field(default_factory=Memory)
    mean: Mean = unchanged
    norm: Norm = whole
    weighted: WeightedLosses | None = None
    wants_params_gradient: bool = False

    @property
    def whole(self) -> bool:
        """Whether the losses are complete, not one process's parts."""
        return self.mean is unchanged

    def of_all(self, in_params: Gradients, params: Params) -> Gradients:
        """The mean over processes of a product with second derivatives in params."""
        return self.mean(in_params, params, "a product with the second derivatives")

    def at(self, meta_params: Params) -> "Problem":
        """The same problem at another phi, without the values known for the old one."""
        return replace(self, meta_params=meta_params, first_gradient=None, first_inner=None)

    def inner_loss(self, params: Params, meta_params: Params, t: int) -> Tensor:
        """The inner loss of step t, checked to be a finite scalar."""
        return checked_scalar(self.inner(params, meta_params, self.batches[t]), f"the inner loss of step {t}")

    def inner_gradient(self, params: Params, t: int) -> Gradients:
        """The gradient of step t at `params`, without a graph."""
        if t == 0 and self.first_gradient is not None:
            found = dense(self.first_gradient(params))
        else:
            theta = leaves(params)
            found = gradients(self.inner_loss(theta, self.meta_params, t), theta)
        return self.mean(found, params, f"the gradient of inner step {t}")

    def step(self, gradient: Gradients, state: Any, params: Params, meta_params: Params) -> tuple[Params, Any]:
        """One step of the inner optimizer, differentiable in all arguments."""
        return apply(self.optimizer(meta_params), gradient, state, params)

    def sweep(self, visit: Callable[[int, Params, Any, Gradients], None] | None = None) -> tuple[Params, Any]:
        """Take the K steps without a graph; return theta_K and the optimizer's state.

        Args:
            visit: called before each step with t, theta_t, the state and the gradient.

        Raises:
            MetaKDError: there is no batch.
        """
        if not self.batches:
            raise MetaKDError(NO_BATCHES)
        params, state = self.params, self.optimizer_state
        for t in range(len(self.batches)):
            gradient = self.inner_gradient(params, t)
            if visit is not None:
                visit(t, params, state, gradient)
            with torch.no_grad():
                params, state = self.step(gradient, state, params, self.meta_params)
        return params, state

    def outer_gradients(self, params: Params) -> tuple[Tensor, Gradients, Gradients]:
        """The outer loss at `params` and its gradients in params and phi; the one in phi is this process's part."""
        theta, meta = leaves(params), leaves(self.meta_params)
        values, in_params, in_meta = [], dict.fromkeys(theta), dict.fromkeys(meta)
        for outer in self.outers:
            loss = checked_scalar(outer(theta, meta), "the outer loss")
            loss = loss if len(self.outers) == 1 else loss / len(self.outers)
            found = joint_gradients(loss, theta, meta)
            values.append(loss.detach())
            in_params, in_meta = added(in_params, found[0]), added(in_meta, found[1])
        value = {_OUTER: values[0] if len(values) == 1 else torch.stack(values).sum()}
        mean = self.mean({**in_params, **value}, {**params, **value}, "the outer loss and its gradient")
        return with_zeros(mean, value)[_OUTER], {name: mean[name] for name in params}, in_meta


class Estimator(Protocol):
    """Anything that answers a `Problem` with a `Hypergradient`; a small frozen object by convention.

    Optional attributes tell checks more about it: `exact(steps) -> bool`, whether its answer is exact for that many
    inner steps (default: yes); `needs_second_derivatives` (default True); `needs_forward_mode` (default False); and
    `solved(problem)`, the problem whose hypergradient it gives, if that is another one; and `takes_shards`, whether it
    works where each process holds a part of the parameters (default False).
    """

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi."""


def checked_scalar(loss: Any, what: str) -> Tensor:
    """The loss, or raise if it is no real, finite scalar tensor."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise MetaKDError(f"{what} must be a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    if loss.is_complex():
        raise MetaKDError(f"{what} is complex ({loss.dtype}); take its .abs() or .real, a loss is a real number")
    check(partial(_judge, what), loss)
    return loss.reshape(())


def _judge(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise MetaKDError(f"{what} is {value}; lower the learning rate, or look for invalid inputs in its batch")


NO_BATCHES = "batches is empty: its length is the number of inner steps, so give at least one batch"
_OUTER = "the outer loss"  # no parameter's name, as these have no spaces
