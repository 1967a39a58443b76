"""The bilevel problem an estimator is given, and the answer it owes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metakd.batch import map_tensors
from metakd.derivatives import Gradients, added, filled, gradients, in_both, leaves
from metakd.errors import MetaKDError
from metakd.inner import GradientTransformation, Params, apply

Inner = Callable[[Params, Params, Any], Tensor]
Outer = Callable[[Params, Params], Tensor]
Mean = Callable[[Gradients, Params, str], Gradients]
"""(values, like, what) -> their mean over all parts of the problem, with the names of `like`.

Values may leave names out, which count as zero; `what` says in errors what they are."""


def unchanged(values: Gradients, like: Params, what: str) -> Gradients:
    """The mean where the problem has one part: the values themselves."""
    return values


class Hypergradient(NamedTuple):
    """What an estimator returns; all tensors are detached.

    Attributes:
        outer_loss: the outer loss at the end of the inner steps, a scalar.
        gradient: its gradient in the meta-parameters, a dict like them.
        params: theta_K, the parameters after the inner steps.
        optimizer_state: the inner optimizer's state after them.

    Examples:
        >>> import torchopt
        >>> from metakd import hypergradient
        >>> inner, outer = lambda p, m, batch: m["w"] * p["x"] ** 2, lambda p, m: p["x"] ** 2
        >>> start = {"x": torch.tensor(1.0)}, {"w": torch.tensor(0.5)}
        >>> hypergradient(inner, outer, *start, [None], optimizer=torchopt.sgd(lr=0.1)).gradient
        {'w': tensor(-0.3600)}
    """

    outer_loss: Tensor
    gradient: Params
    params: Params
    optimizer_state: Any


@dataclass(frozen=True)
class Problem:
    """min over phi of outer(theta_K, phi), theta_{t+1} = theta_t + update(grad inner(theta_t, phi, batch_t)).

    Attributes:
        inner: (params, meta_params, batch) -> scalar. Pure: called again with the same arguments it gives
            the same value.
        outers: (params, meta_params) -> scalar, one or several; the outer loss is their mean.
        params: theta_0, detached.
        meta_params: phi, detached.
        batches: one a step; their number is K.
        optimizer: meta_params -> the differentiable inner optimizer.
        optimizer_state: the state it starts from.
        first_gradient: gives grad inner(theta_0, phi, batches[0]) in the parameters of these names, where the
            caller has it at hand for less than the price of computing it from `inner`.
        first_inner: likewise inner(theta_0, phi, batches[0]) as a function of phi.
        memory: what estimators learn about this problem and want to know at its next hypergradient, such as that
            its model has no forward-mode derivatives. It lives as long as its owner wants.
        mean: where `inner` and `outers` are one process's parts of losses that are means over several processes: takes
            the mean of gradients in params. The hypergradient that an estimator returns stays this process's part.

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
    memory: dict[str, Any] = field(default_factory=dict)
    mean: Mean = unchanged

    @property
    def whole(self) -> bool:
        """Whether the losses are all there is, and not one process's parts."""
        return self.mean is unchanged

    def at(self, meta_params: Params) -> "Problem":
        """The same problem at another phi; what was at hand for the old one is dropped."""
        return replace(self, meta_params=meta_params, first_gradient=None, first_inner=None)

    def inner_loss(self, params: Params, meta_params: Params, t: int) -> Tensor:
        """The inner loss of step t, known to be one finite number."""
        return checked_scalar(self.inner(params, meta_params, self.batches[t]), f"the inner loss of step {t}")

    def inner_gradient(self, params: Params, t: int) -> Gradients:
        """The gradient that step t takes from `params`, without a graph."""
        if t == 0 and self.first_gradient is not None:
            found = self.first_gradient(params)
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
    """Anything that answers a `Problem` with a `Hypergradient`; a small frozen object by convention."""

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi."""


def checked_scalar(loss: Any, what: str) -> Tensor:
    """The loss itself, if it is one finite number.

    Raises:
        MetaKDError: it is not a scalar tensor, or NaN or infinite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise MetaKDError(f"{what} must be a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    if not bool(loss.detach().isfinite()):
        raise MetaKDError(f"{what} is {loss.item()}; lower the learning rate, or look for invalid inputs in its batch")
    return loss.reshape(())


def answer(
    problem: Problem, outer_loss: Tensor, gradient: Gradients, params: Params, optimizer_state: Any
) -> Hypergradient:
    """Detach the results, after making sure that the hypergradient says something.

    Raises:
        MetaKDError: the hypergradient is NaN or infinite, or all of it is missing or exactly zero.
    """
    # Of a part nothing is no error: others add to it.
    if problem.whole and not any(g is not None and bool(g.any()) for g in gradient.values()):
        missing = all(g is None for g in gradient.values())
        raise MetaKDError(
            f"the hypergradient is {'None' if missing else 'zero'} for all meta-parameters {list(gradient)[:5]}: "
            "the outer loss does not feel them. Likely causes: an inner learning rate of 0 (a scheduler's warm-up: "
            "pass meta_batch=None until it is over), a meta-parameter that was detached or overwritten in the inner "
            "loss, weights that cannot vary (softmax over one term), or an outer loss that ignores the parameters"
        )
    for name, g in gradient.items():
        if g is not None and not bool(g.isfinite().all()):
            raise MetaKDError(
                f"the hypergradient of {name!r} has {int((~g.isfinite()).sum())} NaN or infinite entries of "
                f"{g.numel()}; an inner step through a square root at zero does that (RMSprop, Adagrad: set their "
                "eps inside the root), as does an inner loss without second derivatives"
            )
    found = outer_loss, filled(gradient, problem.meta_params), params, optimizer_state
    return Hypergradient(*map_tensors(Tensor.detach, found))


NO_BATCHES = "batches is empty: its length is the number of inner steps, so give at least one batch"
_OUTER = "the outer loss"  # beside the names of parameters, which have no spaces
