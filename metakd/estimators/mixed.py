"""The mixed second derivative of the inner loss, times a vector: the heart of every exact estimator."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metakd.derivatives import Gradients, gradients, graph_gradients, leaves, second_order_gradients, slope
from metakd.errors import MetaKDError
from metakd.estimators.problem import Problem
from metakd.estimators.walk import Products
from metakd.inner import Params

Mode = Literal["auto", "forward", "reverse"]


def mixed_alone(mode: Mode = "auto") -> Products:
    """The mixed product without the one in the parameters: nothing before the first step asks for that."""
    return lambda problem, params, meta, batch, u: ({}, mixed_product(problem, params, meta, batch, u, mode=mode))


def mixed_product(problem: Problem, params: Params, meta: Params, batch: Any, u: Params, *, mode: Mode) -> Gradients:
    """grad_phi of the directional derivative of the inner loss along u, with u held fixed.

    Args:
        problem: gives the inner loss, and remembers whether it has forward-mode derivatives.
        params: theta, where the derivative is taken; detached.
        meta: phi, leaves of autograd.
        batch: of the inner loss.
        u: the direction, for those parameters that it moves.
        mode: `"forward"` is one pass with dual numbers, `"reverse"` a double backward, `"auto"` the first where the
            model has it and else the second, saying so once.

    Raises:
        MetaKDError: the model lacks what the mode needs.
    """
    if mode == "reverse" or (mode == "auto" and problem.memory.get("forward_mode") is False):
        return _reverse(problem, params, meta, batch, u)
    try:
        return _forward(problem, params, meta, batch, u)
    except Exception as error:
        if not lacks_forward_mode(error):
            raise
        if mode == "forward":
            raise MetaKDError(
                "OneStep(mode='forward') met an operation without a forward-mode derivative "
                f"({first_line(error)}); use mode='auto' or 'reverse'"
            ) from error
        problem.memory["forward_mode"] = False
        warnings.warn(
            f"an operation of this model has no forward-mode derivative ({first_line(error)}); reverse mode takes its "
            "place from now on, as exact, with more time and memory (OneStep(mode='reverse') does so in silence)",
            stacklevel=3,
        )
        return _reverse(problem, params, meta, batch, u)


class _NoGradStopsTangents(TorchFunctionMode):
    """A block where `torch.no_grad()` stops dual numbers too, as it stops reverse mode; by itself it lets them pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and args[0] != torch.is_grad_enabled():
            torch._C._set_fwd_grad_enabled(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def dual_numbers() -> Iterator[None]:
    """A block of forward-mode differentiation."""
    with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(True), _NoGradStopsTangents():
        yield


def duals(params: Params, u: Params) -> Params:
    """Dual numbers that move along u; parameters that it leaves out do not move."""
    return {name: forward_ad.make_dual(p, u[name]) if name in u else p for name, p in params.items()}


def _forward(problem: Problem, params: Params, meta: Params, batch: Any, u: Params) -> Gradients:
    with dual_numbers():
        loss = problem.inner(duals(params, u), meta, batch)
        derivative = forward_ad.unpack_dual(loss).tangent
    # Outside of the block, where the backward pass has no tangents to carry along.
    return dict.fromkeys(meta) if derivative is None else gradients(derivative, meta)


def _reverse(problem: Problem, params: Params, meta: Params, batch: Any, u: Params) -> Gradients:
    moved = leaves({name: params[name] for name in u})
    loss = problem.inner({**params, **moved}, meta, batch)
    g = graph_gradients(loss, moved)
    derivative = slope(g, u)
    return dict.fromkeys(meta) if derivative is None else second_order_gradients(derivative, meta)


def lacks_forward_mode(error: BaseException) -> bool:
    """Whether an error says that an operation has no forward-mode derivative."""
    texts = [str(e).lower() for e in _chain(error) if isinstance(e, NotImplementedError | RuntimeError)]
    return any(words in text for text in texts for words in _NO_FORWARD_MODE)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def first_line(error: BaseException) -> str:
    """What the first error of a chain says, shortened."""
    return str(list(_chain(error))[-1]).splitlines()[0][:160]


# The last one: torch's tangents of log_softmax and logsumexp overwrite what their own backward pass needs, which shows
# where logits depend on phi. An in-place operation of the user's own fails in reverse mode once more.
_NO_FORWARD_MODE = ("forward ad", "forward mode", "jvp", "modified by an inplace operation")
