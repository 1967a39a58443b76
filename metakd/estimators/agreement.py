"""What `hypergradient(verify=...)` compares: products, repeated evaluations, and hypergradients."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metakd._autodiff import Gradients, NoSecondDerivative, gradients, leaves, norm, with_zeros
from metakd.errors import MetaKDError
from metakd.estimators.problem import Problem, checked_scalar
from metakd.estimators.tolerance import CANCELLED, tolerance, tolerance_of
from metakd.inner import Params


def reject_other_products(
    problem: Problem,
    params: Params,
    meta: Params,
    batch: Any,
    u: Params,
    *,
    forward: tuple[Gradients, Gradients],
    reverse: Callable[[], tuple[Gradients, Gradients]],
    what: str,
) -> None:
    """Raise if forward-mode products of u differ from reverse mode's; `what` names the forward way in errors."""
    try:
        expected = reverse()
    except NoSecondDerivative as error:
        raise MetaKDError(
            f"{what} cannot be compared with reverse mode, which this model lacks ({error.fact}), so it may be "
            "silently wrong. Pass verify=False to accept that; estimators.FiniteDifference() needs neither mode"
        ) from error
    theta = leaves({name: params[name] for name in u})
    loss = problem.inner({**params, **theta}, {name: m.detach() for name, m in meta.items()}, batch)
    limit = problem.memory.tolerance or tolerance_of(loss)
    lengths = norm(gradients(loss, theta).values()) * norm(u.values())
    for found, right, like in zip(forward, expected, (params, meta), strict=True):
        if found:
            _reject_difference(found, with_zeros(right, like), limit, lengths, what)


def reject_impure(problem: Problem) -> None:
    """Raise if the first inner loss or the outer loss gives another value the second time, from equal generators."""
    theta, meta = leaves(problem.params), leaves(problem.meta_params)
    _reject_another_value("the inner loss", lambda: problem.inner_loss(theta, meta, 0))
    for i, outer in enumerate(problem.outers):
        name = "the outer loss" if len(problem.outers) == 1 else f"the outer loss of batch {i}"
        _reject_another_value(name, partial(outer, theta, meta))


def _reject_another_value(name: str, loss: Callable[[], Tensor]) -> None:
    first, second = (checked_scalar(loss(), name).detach() for _ in range(2))
    if not abs(first - second) <= 100 * torch.finfo(first.dtype).eps * max(abs(first), abs(second)):
        raise MetaKDError(
            f"{name} is not a pure function: the same arguments and generators gave {first.item():.9g} and then "
            f"{second.item():.9g}. It keeps a state (a counter, a buffer, a cache), changes its inputs in place, or "
            "draws from a generator of its own (torch.Generator, numpy.random.Generator); pass such a state in"
        )


def reject_other_hypergradient(found: Params, expected: Params, by: tuple[Any, Any]) -> None:
    """Raise if the hypergradients of two exact estimators differ."""
    one, other = by
    limit = max((tolerance(g.dtype, g.device.type) for g in expected.values()), default=0.0)
    _reject_difference(found, expected, limit, 0.0, f"the hypergradient by {one}", f"that by {other}")


def _reject_difference(
    found: Mapping[str, Tensor | None],
    expected: Params,
    limit: float,
    lengths: float,
    what: str,
    than: str = "reverse mode",
) -> None:
    rounding = CANCELLED * limit * max(norm(expected.values()), lengths)
    for name, right in expected.items():
        value = found.get(name)
        difference = norm([right if value is None else value - right])
        floor = torch.finfo(right.dtype).eps / 10  # smaller differences are rounding
        if not difference <= limit * norm([right]) + rounding + floor and bool(right.isfinite().all()):
            raise MetaKDError(
                f"{what} differs from {than} by {difference:.3g} in {name!r}: {_numbers(value)} against "
                f"{_numbers(right)}. An operation has a wrong derivative in one of the two, or a loss is not a "
                "pure function; use estimators.Adjoint(), and check_hypergradient to see which is right"
            )


def _numbers(value: Tensor | None) -> str:
    """A tensor's first few numbers."""
    if value is None:
        return "nothing"
    few = ", ".join(f"{v:.4g}" for v in value.detach().flatten()[:4].tolist())
    return f"[{few}{', ...' if value.numel() > 4 else ''}]"
