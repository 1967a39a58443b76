"""The bilevel problem an estimator is given."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metakd._autodiff import Gradients, added, dense, filled, gradients, in_both, leaves
from metakd.errors import MetaKDError
from metakd.estimators.memory import Memory
from metakd.estimators.result import Hypergradient
from metakd.inner import GradientTransformation, Params, apply

Inner = Callable[[Params, Params, Any], Tensor]
Outer = Callable[[Params, Params], Tensor]
Mean = Callable[[Gradients, Params, str], Gradients]
"""(values, like, what) -> their mean over all parts of the problem, with the names of `like`.

Values may leave names out, which count as zero; `what` says in errors what they are."""


def unchanged(values: Gradients, like: Params, what: str) -> Gradients:
    """The mean where the problem has one part: the values themselves."""
    return values


class WeightedLosses(NamedTuple):
    r"""Says that $\mathrm{inner}(\theta, \phi, b) = \frac{1}{B} \sum_{ik} w_{ik}(\phi, b)\, \ell_{ik}(\theta, b)$.

    Meta-parameters then meet the losses and their tangents in a product alone, and forward mode is exact.

    Attributes:
        losses: (params, batch) -> (B, M).
        weights: (meta_params, batch) -> (B, M).
        names: of the M terms.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> weighted = WeightedLosses(lambda p, b: (p["w"] * x)[:, None], lambda m, b: m["phi"][:, None], ["linear"])
        >>> weighted.losses({"w": torch.tensor(3.0)}, None).shape
        torch.Size([2, 1])
    """

    losses: Callable[[Params, Any], Tensor]
    weights: Callable[[Params, Any], Tensor]
    names: Sequence[str]


class Step(NamedTuple):
    """The batch of an inner step, and its number: a step may begin where the one before ended.

    Examples:
        >>> Step.all_of(["a", "b"])[1]
        Step(number=1, batch='b')
    """

    number: int
    batch: Any

    @classmethod
    def all_of(cls, batches: Iterable[Any]) -> "list[Step]":
        """The steps over some batches."""
        return [cls(t, batch) for t, batch in enumerate(batches)]


@dataclass(frozen=True)
class Problem:
    """min over phi of outer(theta_K, phi), theta_{t+1} = theta_t + update(grad inner(theta_t, phi, batch_t)).

    Attributes:
        inner: (params, meta_params, batch) -> scalar. Pure: called again with the same arguments it gives
            the same value.
        outers: (params, meta_params) -> scalar, one or several; the outer loss is their mean.
        params: theta_0, detached.
        meta_params: phi, detached.
        batches: one a step, for `inner`; their number is K. A `Step` has its number beside it.
        optimizer: meta_params -> the differentiable inner optimizer.
        optimizer_state: the state it starts from.
        first_gradient: gives grad inner(theta_0, phi, batches[0]) in the parameters of these names, where the
            caller has it at hand for less than the price of computing it from `inner`.
        first_inner: likewise inner(theta_0, phi, batches[0]) as a function of phi.
        memory: what estimators learn about this problem and want to know at its next hypergradient, such as that
            its model has no forward-mode derivatives. It lives as long as its owner wants.
        mean: where `inner` and `outers` are one process's parts of losses that are means over several processes: takes
            the mean of gradients in params. The hypergradient that an estimator returns stays this process's part.
        weighted: where the inner loss is a weighted mean of losses: its parts.
        wants_params_gradient: whether the gradient in theta_0 is asked for as well.

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
    weighted: WeightedLosses | None = None
    wants_params_gradient: bool = False

    @property
    def whole(self) -> bool:
        """Whether the losses are all there is, and not one process's parts."""
        return self.mean is unchanged

    def of_all(self, in_params: Gradients, params: Params) -> Gradients:
        """A product with second derivatives in params, from this process's part of it."""
        return self.mean(in_params, params, "a product with the second derivatives")

    def at(self, meta_params: Params) -> "Problem":
        """The same problem at another phi; what was at hand for the old one is dropped."""
        return replace(self, meta_params=meta_params, first_gradient=None, first_inner=None)

    def inner_loss(self, params: Params, meta_params: Params, t: int) -> Tensor:
        """The inner loss of step t, known to be one finite number."""
        return checked_scalar(self.inner(params, meta_params, self.batches[t]), f"the inner loss of step {t}")

    def inner_gradient(self, params: Params, t: int) -> Gradients:
        """The gradient that step t takes from `params`, without a graph."""
        if t == 0 and self.first_gradient is not None:
            found = dense(self.first_gradient(params))
        else:
            theta = leaves(params)
            found = gradients(self.inner_loss(theta, self.meta_params, t), theta)
        return self.mean(found, params, f"the gradient of inner step {t}")

    def step(self, gradient: Gradients, state: Any, params: Params, meta_params: Params) -> tuple[Params, Any]:
        """One step of the inner optimizer, differentiable in all of its arguments."""
        return apply(self.optimizer(meta_params), gradient, state, params)

    def sweep(self, visit: Callable[[int, Params, Any, Gradients], None] | None = None) -> tuple[Params, Any]:
        """Take the K steps without a graph; theta_K and the optimizer's state there.

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
        """The outer loss at `params`, and its gradients there in params and in phi; one outer's graph at a time.

        The one in phi is this process's part.
        """
        theta, meta = leaves(params), leaves(self.meta_params)
        values, in_params, in_meta = [], dict.fromkeys(theta), dict.fromkeys(meta)
        for outer in self.outers:
            loss = checked_scalar(outer(theta, meta), "the outer loss") / len(self.outers)
            found = in_both(loss, theta, meta)
            values.append(loss.detach())
            in_params, in_meta = added(in_params, found[0]), added(in_meta, found[1])
        value = {_OUTER: torch.stack(values).sum()}
        mean = self.mean({**in_params, **value}, {**params, **value}, "the outer loss and its gradient")
        return filled(mean, value)[_OUTER], {name: mean[name] for name in params}, in_meta


class Estimator(Protocol):
    """Anything that answers a `Problem` with a `Hypergradient`; a small frozen object by convention.

    It may say of itself what checks and findings ask for: `exact(steps) -> bool`, whether its answer is exact for that
    many inner steps (else it is taken to be); `needs_second_derivatives` (else True) and `needs_forward_mode` (else
    False); `solved(problem)`, the problem whose hypergradient it gives, where that is another one.
    """

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi."""


def checked_scalar(loss: Any, what: str) -> Tensor:
    """The loss itself, if it is one finite number.

    Raises:
        MetaKDError: it is not a real scalar tensor, or NaN or infinite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise MetaKDError(f"{what} must be a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    if loss.is_complex():
        raise MetaKDError(f"{what} is complex ({loss.dtype}); take its .abs() or .real, a loss is a real number")
    if not bool(loss.detach().isfinite()):
        raise MetaKDError(f"{what} is {loss.item()}; lower the learning rate, or look for invalid inputs in its batch")
    return loss.reshape(())


NO_BATCHES = "batches is empty: its length is the number of inner steps, so give at least one batch"
_OUTER = "the outer loss"  # beside the names of parameters, which have no spaces
