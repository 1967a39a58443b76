"""Real passes and virtual ones over the same batches: do they give the same losses and gradients?"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from metakd._autodiff import gradients, leaves
from metakd._call.objective import Objective
from metakd._proof.differences import check_gradients, check_losses
from metakd._proof.real_passes import Hooks, Pass, Real, mixed, real_passes
from metakd._virtual.precision import as_written
from metakd.errors import MetaKDError, blamed
from metakd.estimators.tolerance import tolerance_of

_AT_MOVED = 5e-3  # of gradients there; checkpoints of code that is not pure give slightly others when recomputed


class Compared(NamedTuple):
    """What a comparison without a difference found.

    Attributes:
        losses: (B, M) of the virtual pass over the first batch.
        hooked: whether the real passes hang hooks on activations.
    """

    losses: Tensor
    hooked: bool


def compare_passes(objective: Objective) -> Compared | None:
    """Run the first inner steps' passes and the meta batch's both ways; compare losses and gradients.

    All passes but the first find the parameters moved: one that reads them from another place takes no notice of
    that, nor does one that keeps what it computed from them.

    Returns:
        None where a real pass ran in float16, whose losses virtual passes do not repeat.

    Raises:
        MetaKDError: they differ, a virtual pass fails, or a real pass writes to parameters.
    """
    objective = objective.opening()
    hooks = Hooks()
    passes = [
        Pass("the batch", step.batch, objective.terms, partial(objective.losses, step=step)) for step in objective.steps
    ]
    passes.append(Pass("the meta batch", objective.meta_batch, objective.meta_terms, objective.meta_losses))
    with objective.student.untouched() as start:
        reals = real_passes(objective.student, passes, start, hooks)
        if reals is None:
            return None
        with as_written(objective.student.device_type):
            losses = [
                _compared(one, real, moved=t > 0) for t, (one, real) in enumerate(zip(passes, reals, strict=True))
            ]
    return Compared(losses[0], hooks.found)


def same_losses(one: Tensor, other: Tensor) -> bool:
    """Whether two passes gave the same losses, to rounding."""
    try:
        check_losses(one, other, [""] * one.shape[1], tolerance_of(one), "")
    except MetaKDError:
        return False
    return True


def _compared(one: Pass, real: Real, *, moved: bool) -> Tensor:
    """The losses of a virtual pass, which are those of the real one, and so is their gradient."""
    theta = leaves(real.params)
    dtypes = "/".join(sorted({str(p.dtype) for p in theta.values()}))
    with blamed(f"a virtual pass in {dtypes} over {one.what}, unlike the real one"):
        virtual = one.virtual(theta)
        repeated = virtual if moved else one.virtual(theta)
    limit = max(tolerance_of(virtual), real.limit)  # virtual passes may be the finer ones
    where = f"{one.what}, with the parameters moved a little," if moved else one.what
    for losses in (virtual, repeated):  # what goes round in a circle may fit once
        check_losses(real.losses, losses.detach(), list(one.terms), limit, where)
    if moved:
        limit = max(limit, _AT_MOVED)
    if not moved or all(bool(g.isfinite().all()) for g in real.gradient.values() if g is not None):
        found = gradients(mixed(virtual), theta)
        check_gradients(
            real.gradient, found, theta, lambda near: gradients(mixed(one.virtual(near)), near), limit, where
        )
    return virtual.detach()
