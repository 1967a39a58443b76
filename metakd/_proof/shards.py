"""The proof for a sharded student: its virtual passes against real ones, decided by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metakd._autodiff import Gradients, gradients, leaves, moved, norm
from metakd._call.objective import Objective
from metakd._call.ranks import Ranks
from metakd._call.train_pass import TrainPass
from metakd._proof.real_passes import Pass, passes_of, uncancelled_mean
from metakd._virtual.precision import HALF, as_written
from metakd._virtual.shards import computing_dtypes
from metakd.batch import detached_copy
from metakd.errors import MetaKDError
from metakd.estimators.influence import influence
from metakd.estimators.problem import WeightedLosses
from metakd.estimators.tolerance import as_share, tolerance_of
from metakd.inner import Params

_HALF = 5e-2  # tolerance where a policy computes in half precision
_DIFFERENCE = 0.2  # tolerance of a finite difference, which kinks spoil


class _Real(NamedTuple):
    losses: Tensor
    gradient: Gradients


def compare_shards(objective: Objective, ranks: Ranks, *, forward_mode: bool) -> None:
    """Compare losses, gradients and slopes of virtual passes with those of real ones, over the first steps' batches.

    The slope along the gradient g must be <g, g>: by a difference of passes with the parts moved, and in forward mode
    if the estimator uses it. So a pass that misses moved parts, or gradients that are no means, are noticed.

    Raises:
        MetaKDError: they differ on any process, on all of them.
    """
    objective, student = objective.opening(), objective.student
    passes = passes_of(objective)
    reals: list[_Real] = []
    with student.untouched() as start:
        for what, batch, terms, _ in passes:
            train = TrainPass(student.module, student, detached_copy(batch), terms, start, what=what)
            if train.float16:
                return
            with as_written(student.device_type):
                gradient = train.last_gradient_of(uncancelled_mean(train.losses), student.trainable())
            reals.append(_Real(train.losses.detach(), gradient))
    with as_written(student.device_type):
        theta = {name: p.clone() for name, p in student.detached().items()}
        floor = _HALF if computing_dtypes(student.module) & {*HALF} else 0.0
        for one, real in zip(passes, reals, strict=True):
            _compare(one, real, theta, ranks, floor, forward_mode=forward_mode)


def _compare(one: Pass, real: _Real, theta: Params, ranks: Ranks, floor: float, *, forward_mode: bool) -> None:
    def mean_over_ranks(losses: Tensor, what: str) -> float:
        return float(ranks.joined(uncancelled_mean(losses.detach()).reshape(1), what)[0].mean())

    def length(values: Gradients, what: str) -> float:
        return float(ranks.joined(torch.tensor([norm(values.values())]), what)[0].norm())

    def check(off: float, limit: float, what: str) -> None:
        """All ranks raise if one is off."""
        worst = float(ranks.joined(torch.tensor([off]), what)[0].nan_to_num(torch.inf).max())
        if worst > limit:
            raise MetaKDError(
                f"a virtual pass of the sharded student over {one.what}: {what} off by {as_share(worst)} of the real "
                f"pass's. {_CAUSES}"
            )

    near = leaves(theta)
    virtual = one.virtual(near)
    limit = max(tolerance_of(virtual), tolerance_of(real.losses), floor)
    size = float(torch.maximum(real.losses.norm(), virtual.detach().norm())) + tolerance_of(virtual)
    check(float((virtual.detach() - real.losses).norm()) / size, limit, "losses are")
    found = gradients(uncancelled_mean(virtual), near)
    g = length(real.gradient, "the length of a gradient")
    if g == 0.0:
        return
    pairs = {name: (a, b) for name, a in real.gradient.items() if a is not None and (b := found[name]) is not None}
    check(length({n: a - b for n, (a, b) in pairs.items()}, "a difference of gradients") / g, limit, "the gradient is")
    u = {name: a / g for name, (a, _) in pairs.items()}
    h = torch.finfo(virtual.dtype).eps ** (1 / 3) * max(length({**theta}, "the length of the parameters"), 1e-3)

    def at(step: float) -> float:
        with torch.no_grad():
            return mean_over_ranks(one.virtual(moved(theta, u, step)), "a moved pass")

    if not floor:
        check(abs((at(h) - at(-h)) / (2 * h) - g) / g, _DIFFERENCE, "a finite difference along the gradient is")
    tangent = _tangent(one.virtual, list(one.terms), theta, u) if forward_mode else None
    if tangent is not None:
        check(abs(mean_over_ranks(tangent, "a tangent") - g) / g, limit, "forward mode along the gradient is")


def _tangent(virtual: Callable[[Params], Tensor], names: list[str], theta: Params, u: Params) -> Tensor | None:
    """The losses' derivative along u; None if forward mode fails, of which the estimator will tell."""
    weighted = WeightedLosses(lambda params, _: virtual(params), lambda *_: torch.empty(0), names)
    try:
        return influence(weighted, theta, None, u)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:
        return None


_CAUSES = (
    "Either the model reads parameters past fully_shard, or keeps state where virtual passes cannot see it, or its "
    "gradients are no means over the processes (set_gradient_divide_factor); or pass verify=False if no hypergradient "
    "needs to be right"
)
