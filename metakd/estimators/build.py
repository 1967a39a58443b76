"""Turns the arguments of `hypergradient` into a problem: checked, with flat names and real tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from metakd.batch import map_tensors, tensors
from metakd.errors import MetaKDError
from metakd.estimators.nested import as_given, detached, on_flat, real, unflatten
from metakd.estimators.problem import NO_BATCHES, Outer, Problem, Step
from metakd.estimators.randomness import Replay
from metakd.inner import GradientTransformation, repaired
from metakd.inner.transformation import is_transformation

Nest = Mapping[str, Any]
"""A dict of name -> tensor; dicts may be nested."""

Optimizer = GradientTransformation | Callable[[Any], GradientTransformation]


def build_problem(
    inner: Callable[[Any, Any, Any], Tensor],
    outer: Callable[..., Tensor],
    params: Nest,
    meta_params: Nest,
    batches: Sequence[Any],
    optimizer: Optimizer,
    optimizer_state: Any = None,
    *,
    outer_batches: Sequence[Any] | None = None,
) -> Problem:
    """Check the arguments of `hypergradient` and build its problem.

    An evaluation that is repeated draws the same random numbers again.
    """
    for name, loss in (("inner", inner), ("outer", outer)):
        if not callable(loss):
            raise MetaKDError(f"{name} must be a function that returns a loss, got {type(loss).__name__}")
    data = _listed(batches, "batches")
    if not data:
        raise MetaKDError(NO_BATCHES)
    outer_data = [None] if outer_batches is None else _listed(outer_batches, "outer_batches")
    if not outer_data:
        raise MetaKDError("outer_batches is empty; give at least one batch, or None for an outer loss without batches")
    theta = detached(params, "params")
    phi = {} if isinstance(meta_params, Mapping) and not meta_params else detached(meta_params, "meta_params")
    replay = Replay(t.device for t in tensors([theta, phi, data, outer_data]))

    def inner_at(p: Any, m: Any, step: Step) -> Tensor:
        with replay(("inner", step.number)):
            return inner(as_given(p, params), as_given(m, meta_params), step.batch)

    def outer_at(i: int) -> Outer:
        batch = () if outer_batches is None else (outer_data[i],)

        def loss(p: Any, m: Any) -> Tensor:
            with replay(("outer", i)):
                return outer(as_given(p, params), as_given(m, meta_params), *batch)

        return loss

    def optimizer_at(m: Any) -> GradientTransformation:
        found: Any = optimizer(as_given(m, meta_params)) if callable(optimizer) else optimizer
        if not is_transformation(found):
            raise MetaKDError(
                "optimizer must be a torchopt GradientTransformation such as torchopt.sgd(lr=0.1), or a function "
                f"meta_params -> GradientTransformation, got {type(found).__name__}; torch.optim optimizers go to "
                "BilevelLossBalancer(optimizer=..., inner='mirror')"
            )
        return on_flat(repaired(found), params)

    start = optimizer_at(phi)
    return Problem(
        inner_at,
        [outer_at(i) for i in range(len(outer_data))],
        theta,
        phi,
        Step.all_of(data),
        optimizer_at if callable(optimizer) else lambda _: start,
        start.init(unflatten(theta, params)) if optimizer_state is None else map_tensors(real, optimizer_state),
    )


def _listed(batches: Any, what: str) -> list[Any]:
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        shown = repr(batches) if isinstance(batches, int | float | str) else f"a {type(batches).__name__}"
        raise MetaKDError(
            f"{what} is {shown}; give a list of batches, such as [batch_0, batch_1], or range(5) for a "
            "loss that needs no batch"
        )
    return list(batches)
