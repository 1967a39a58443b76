"""The bilevel problem an estimator is given, and the answer it owes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metakd.batch import map_tensors
from metakd.errors import MetaKDError
from metakd.handover import graph_nodes
from metakd.inner import GradientTransformation, Params

Gradients = dict[str, Tensor | None]


class Hypergradient(NamedTuple):
    """What an estimator returns; all tensors are detached.

    Attributes:
        outer_loss: the outer loss at the end of the inner steps, a scalar.
        gradient: its gradient in the meta-parameters, a dict like them.
        params: theta_K, the parameters after the inner steps.
        optimizer_state: the inner optimizer's state after them.
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
        outer: (params, meta_params) -> scalar.
        params: theta_0, detached.
        meta_params: phi, detached.
        batches: one a step; their number is K.
        optimizer: the differentiable inner optimizer.
        optimizer_state: the state it starts from.
        first_gradient: gives grad inner(theta_0, phi, batches[0]), where the caller has it at hand for less than the
            price of computing it from `inner`.
        memory: what estimators learn about this problem and want to know at its next hypergradient, such as that
            its model has no forward-mode derivatives. It lives as long as its owner wants.
    """

    inner: Callable[[Params, Params, Any], Tensor]
    outer: Callable[[Params, Params], Tensor]
    params: Params
    meta_params: Params
    batches: Sequence[Any]
    optimizer: GradientTransformation
    optimizer_state: Any
    first_gradient: Callable[[], Gradients] | None = None
    memory: dict[str, Any] = field(default_factory=dict)


class Estimator(Protocol):
    """Anything that answers a `Problem` with a `Hypergradient`; a small frozen object by convention."""

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi."""


def leaves(values: Params) -> Params:
    """The same values as fresh leaves of autograd."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """The gradients of a scalar by name; None where the loss does not reach a parameter."""
    if not loss.requires_grad:
        return dict.fromkeys(params)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return dict(zip(params, found, strict=True))


def in_both(
    loss: Tensor, params: Params, meta_params: Params, take: Callable[[Tensor, Params], Gradients] = gradients
) -> tuple[Gradients, Gradients]:
    """The gradients of a scalar in params and in meta_params, from one backward pass; the two may share names."""
    both = {f"theta.{name}": p for name, p in params.items()} | {f"phi.{name}": p for name, p in meta_params.items()}
    found = take(loss, both)
    return {name: found[f"theta.{name}"] for name in params}, {name: found[f"phi.{name}"] for name in meta_params}


def second_order_gradients(loss: Tensor, params: Params) -> Gradients:
    """`gradients` of a scalar that was built from gradients.

    Raises:
        MetaKDError: an operation on the way has no second derivative.
    """
    # What hangs behind such an operation is lost without a word where autograd finds another way to a parameter.
    if any(node.name().endswith("::Error") for node in graph_nodes(loss)):
        raise MetaKDError(f"an operation of this model is marked @once_differentiable; {_NO_SECOND_ORDER}")
    try:
        return gradients(loss, params)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise MetaKDError(f"{str(error).splitlines()[0][:160]}; {_NO_SECOND_ORDER}") from error


_NO_SECOND_ORDER = (
    "reverse mode would have to differentiate it twice. Use another kernel (for attention "
    "torch.nn.attention.SDPBackend.MATH), estimators.OneStep(mode='forward') or estimators.FiniteDifference()"
)


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
    if not any(g is not None and bool(g.any()) for g in gradient.values()):
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
    filled = {
        name: torch.zeros_like(problem.meta_params[name]) if g is None else g.detach() for name, g in gradient.items()
    }
    detached = {name: p.detach() for name, p in params.items()}
    return Hypergradient(outer_loss.detach(), filled, detached, map_tensors(Tensor.detach, optimizer_state))
