"""Forward mode against reverse mode, on the user's own model: is what one calls the influence what the other does?"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakd._autodiff import Gradients, gradients, leaves, norm
from metakd.estimators.influence import influence
from metakd.estimators.problem import Problem
from metakd.estimators.tolerance import CANCELLED, as_share, tolerance_of
from metakd.inner import Params

_FAINT = 1e-3  # times the tolerance: a gradient shorter than this share of the longest may be rounding alone


class Disagreement(NamedTuple):
    """Where forward mode and reverse mode differ.

    Attributes:
        error: relative, in a directional derivative of the losses.
        term: the name of the term whose losses these are; None for all together.
        layer: where in the model the difference arises, or after it; None where that is not known.

    Examples:
        >>> print(Disagreement(0.41, "soft", "body.2"))
        the influence of the term 'soft' is off by 41%, by something at or after 'body.2'
    """

    error: float
    term: str | None
    layer: str | None

    def __str__(self) -> str:
        what = "all terms together" if self.term is None else f"the term {self.term!r}"
        where = "" if self.layer is None else f", by something at or after {self.layer!r}"
        return f"the influence of {what} is off by {as_share(self.error)}{where}"


class _Probe(NamedTuple):
    """A random combination of the losses, and its gradient by reverse mode.

    Attributes:
        signs: of the combination, (B, M); zero for other terms.
        gradient: in the parameters that move.
        limit: on the relative error.
        tolerance: of the arithmetic.
    """

    signs: Tensor
    gradient: Gradients
    limit: float
    tolerance: float

    def expected(self, along: Params) -> float:
        """The derivative of the combination along a direction, by reverse mode."""
        parts = [(g, along[name]) for name, g in self.gradient.items() if g is not None and name in along]
        return math.fsum(float((g * u).sum()) for g, u in parts)

    def error(self, tangent: Tensor, along: Params) -> float:
        """The relative error of the losses' tangent along a direction; 0.0 where it is within the limit."""
        combined = float((self.signs * tangent).sum())
        parts = [(g, along[name]) for name, g in self.gradient.items() if g is not None and name in along]
        expected = self.expected(along)
        if not math.isfinite(expected):
            return 0.0  # either way, which is not the tangents' fault
        lengths = norm(g for g, _ in parts) * norm(u for _, u in parts)
        scale = max(norm([self.signs * tangent]), abs(expected))
        difference = abs(combined - expected)
        if difference <= self.limit * scale + CANCELLED * self.tolerance * lengths:
            return 0.0
        return difference / scale

    def even(self) -> Params:
        """A direction along which each parameter has a random share of 1 to 2, up or down.

        The step's own direction may have nearly all of its effect through the last layers, and would hide what is wrong
        in the first ones.
        """
        squares = {name: float(g.square().sum()) for name, g in self.gradient.items() if g is not None}
        floor = (_FAINT * self.tolerance) ** 2 * max(squares.values(), default=0.0)
        size = torch.rand(len(squares), generator=_generator()) + 1
        shares = (size * (torch.randint(2, size.shape, generator=_generator()) * 2 - 1)).tolist()
        return {
            name: share / (square + floor) * g
            for (name, square), share in zip(squares.items(), shares, strict=True)
            if (g := self.gradient[name]) is not None and square + floor > 0
        }


def compare_influence(
    problem: Problem, params: Params, batch: Any, u: Params, tangent: Tensor, *, limit: float | None = None
) -> Disagreement | None:
    """Whether the losses' directional derivatives along u are those that reverse mode gives.

    Takes one backward pass a term, with random signs over the samples, and one over all terms. A second forward-mode
    pass, along a direction that moves the losses by all parameters alike, is compared with the last.

    Args:
        problem: a `weighted` one; its memory may have a tolerance.
        params: theta.
        batch: of the losses.
        u: the direction.
        tangent: <grad l_ik, u>, (B, M).
        limit: on the relative error, for a tangent that is not forward mode's; None for the problem's tolerance.

    Returns:
        The first term that is off; None where all agree.
    """
    weighted = problem.weighted
    assert weighted is not None

    def along(direction: Params) -> Tensor:
        return influence(weighted, params, batch, direction)

    moved = leaves({name: params[name] for name in u})
    losses = weighted.losses({**params, **moved}, batch)
    tolerance = problem.memory.tolerance or tolerance_of(losses)
    for name, signs in _signs(losses, weighted.names):
        found = gradients((signs * losses).sum(), moved, retain_graph=True)
        probe = _Probe(signs, found, limit or tolerance, tolerance)
        error, direction = probe.error(tangent, u), u
        if not error and name is None and limit is None and (even := probe.even()):
            error, direction = probe.error(along(even), even), even
        if error and not _is_rounding(problem, params, batch, probe, direction, error):
            return Disagreement(error, name, None if limit else _layer(probe, along))
    return None


def _is_rounding(problem: Problem, params: Params, batch: Any, probe: _Probe, along: Params, error: float) -> bool:
    """Whether the derivative moves as much when the parameters move by a few roundings, as one that is zero does.

    A term whose gradient vanishes, such as a teacher's that is the student itself, leaves nothing but rounding.
    """
    assert problem.weighted is not None
    if not is_faint(probe.gradient, params, probe.tolerance):
        return False
    near = leaves(nudged({name: params[name] for name in probe.gradient}, probe.tolerance))
    losses = problem.weighted.losses({**params, **near}, batch)
    again = probe._replace(gradient=gradients((probe.signs * losses).sum(), near))
    here, there = probe.expected(along), again.expected(along)
    scale = max(abs(here), abs(there))
    return 10 * abs(there - here) >= min(error, 1.0) * scale


def is_faint(gradient: Gradients, params: Params, tolerance: float) -> bool:
    """Whether a gradient is so small that the losses hardly move with the parameters: rounding may be all of it.

    A larger one is no rounding, however much it jumps: nudged parameters may cross a step of the model's.
    """
    felt = [name for name, g in gradient.items() if g is not None]
    size = norm(gradient[name] for name in felt) * norm(params[name] for name in felt)
    return size <= tolerance / 10


def nudged(params: Params, tolerance: float) -> Params:
    """Parameters moved by a few roundings of the arithmetic with this tolerance, up or down."""
    delta = 8 * (tolerance / 10) ** 2
    generator = _generator()
    signs = {name: torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1 for name, p in params.items()}
    return {name: p.detach() * (1 + delta * signs[name]) for name, p in params.items()}


def _signs(losses: Tensor, names: Collection[str]) -> Iterator[tuple[str | None, Tensor]]:
    """For each term, random signs over its samples; then those of all terms."""
    signs = torch.randint(2, losses.shape, generator=_generator()).to(losses) * 2 - 1
    for k, name in enumerate(names):
        yield name, signs * (torch.arange(losses.shape[1], device=losses.device) == k)
    yield None, signs


def _layer(probe: _Probe, along: Callable[[Params], Tensor]) -> str | None:
    """The last parameter whose share of the tangent is wrong, by bisection over their order; its module's name."""
    even = probe.even()
    names = list(even)

    def wrong_from(i: int) -> bool:
        rest = {name: even[name] for name in names[i:]}
        return bool(probe.error(along(rest), rest))

    low, high = 0, len(names)
    try:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if wrong_from(middle) else (low, middle)
    except Exception:  # a direction of its own may fail where the whole does not; the finding stands without a place
        return None
    return (names[low].rpartition(".")[0] or names[low]) if names else None


def _generator() -> torch.Generator:
    """Not the global one, which belongs to the training."""
    return torch.Generator().manual_seed(0)
