"""Compares losses and gradients of real and virtual passes over the same batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metakd._autodiff import gradients, leaves
from metakd._basics.rng import RngState
from metakd._call.objective import Objective
from metakd._proof.differences import check_gradients, check_losses
from metakd._proof.real_passes import Hooks, Pass, RealResult, passes_of, real_passes, uncancelled_mean
from metakd._virtual.precision import as_written
from metakd.errors import MetaKDError, blamed
from metakd.estimators.tolerance import tolerance_of

_AT_MOVED = 5e-3  # tolerance on gradients at moved parameters: recomputing impure checkpoints changes them slightly


class Compared(NamedTuple):
    """What a comparison without a difference gives.

    Attributes:
        losses: (B, M) of the first virtual pass.
        hooked: whether a pass registered hooks on activations.
        draws: whether a pass drew random numbers.
    """

    losses: Tensor
    hooked: bool
    draws: bool


def compare_passes(objective: Objective) -> Compared | None:
    """Compare losses and gradients of real and virtual passes over the first inner steps and the meta batch.

    All passes but the first run at moved parameters, which reveals code that reads or caches the parameters elsewhere.

    Returns:
        None if a real pass ran in float16, whose losses virtual passes do not repeat.

    Raises:
        MetaKDError: they differ, a virtual pass fails, or a real pass writes to parameters.
    """
    objective = objective.opening()
    hooks = Hooks()
    passes = passes_of(objective)
    with objective.student.untouched() as start:
        learned = objective.learned.params()
        reals = real_passes(objective.student, passes, start, hooks, objective.lending, learned)
        if reals is None:
            return None
        draws = not start.rng.same(RngState.capture(objective.student.devices))
        with as_written(objective.student.device_type):
            losses = [
                _compared(one, real, moved=t > 0) for t, (one, real) in enumerate(zip(passes, reals, strict=True))
            ]
    return Compared(losses[0], hooks.found, draws)


def same_losses(one: Tensor, other: Tensor) -> bool:
    """Whether two passes gave the same losses, to rounding."""
    try:
        check_losses(one, other, [""] * one.shape[1], tolerance_of(one, other_kernels=True), "")
    except MetaKDError:
        return False
    return True


def _compared(one: Pass, real: RealResult, *, moved: bool) -> Tensor:
    """Raise if a virtual pass differs from the real one in losses or gradient; return its losses."""
    theta = leaves(real.params)
    dtypes = "/".join(sorted({str(p.dtype) for p in theta.values()}))
    other = "virtual parameters are other objects: key dicts by the parameter or its name, not by id(parameter)"
    with blamed(f"a virtual pass in {dtypes} over {one.what}, unlike the real one ({other}),"):
        virtual = one.virtual(theta)
        repeated = virtual if moved else one.virtual(theta)
    limit = max(tolerance_of(virtual, other_kernels=True), real.limit)  # virtual passes may have finer arithmetic
    where = f"{one.what}, with the parameters moved a little," if moved else one.what
    for losses in (virtual, repeated):  # a state that alternates may fit once
        check_losses(real.losses, losses.detach(), list(one.terms), limit, where)
    if moved:
        limit = max(limit, _AT_MOVED)
    if not moved or all(bool(g.isfinite().all()) for g in real.gradient.values() if g is not None):
        found = gradients(uncancelled_mean(virtual), theta)
        check_gradients(
            real.gradient, found, theta, lambda near: gradients(uncancelled_mean(one.virtual(near)), near), limit, where
        )
    return virtual.detach()
