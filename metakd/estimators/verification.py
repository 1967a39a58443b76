"""Compares forward mode's influence with reverse mode's on the user's own model."""

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

_FAINT = 1e-3  # times the tolerance: gradients below this share of the largest may be rounding only


class Disagreement(NamedTuple):
    """A difference between forward mode and reverse mode.

    Attributes:
        error: relative, in a directional derivative of the losses.
        term: the term's name; None for all terms together.
        layer: the first layer with the difference, or None if unknown.

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
    """A random combination of the losses and its gradient by reverse mode.

    Attributes:
        signs: the combination's signs (B, M), zero for other terms.
        gradient: in the moving parameters.
        limit: the largest relative error.
        tolerance: that of the arithmetic.
    """

    signs: Tensor
    gradient: Gradients
    limit: float
    tolerance: float

    def expected(self, along: Params) -> float:
        """The combination's derivative along a direction, by reverse mode."""
        return math.fsum(float((g * u).sum()) for g, u in self._parts(along))

    def _parts(self, along: Params) -> list[tuple[Tensor, Tensor]]:
        return [(g, along[name]) for name, g in self.gradient.items() if g is not None and name in along]

    def error(self, tangent: Tensor, along: Params) -> float:
        """The relative error of the losses' tangent along a direction; 0.0 within the limit."""
        combined, expected = float((self.signs * tangent).sum()), self.expected(along)
        if not math.isfinite(expected):
            return 0.0  # both modes overflow, so the tangent is not to blame
        parts = self._parts(along)
        lengths = norm(g for g, _ in parts) * norm(u for _, u in parts)
        scale = max(norm([self.signs * tangent]), abs(expected))
        difference = abs(combined - expected)
        if difference <= self.limit * scale + CANCELLED * self.tolerance * lengths:
            return 0.0
        return difference / scale

    def even(self) -> Params:
        """A direction along which each parameter contributes equally, up to a random factor of 1 to 2 and a sign.

        The step's own direction may act mostly through the last layers, and would hide errors in the first ones.
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
    """Compare the losses' derivatives along u, given as `tangent` (B, M), with those of reverse mode.

    It takes one backward pass per term, with random signs over the samples, and one over all terms. The last is also
    compared with a forward-mode pass along a direction in which all parameters contribute equally. `limit` is the
    largest relative error of a tangent that is not forward mode's; None for the problem's tolerance.

    Returns:
        The first term that differs; None if all agree.
    """
    assert problem.weighted is not None
    weighted = problem.weighted.at(problem.meta_params)

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
    """Whether the derivative changes as much when the parameters move by a few roundings, as a zero derivative does.

    A term's gradient may vanish, for example if the student is its own teacher; then it is rounding only.
    """
    assert problem.weighted is not None
    if not is_faint(probe.gradient, params, probe.tolerance):
        return False
    near = leaves(nudged({name: params[name] for name in probe.gradient}, probe.tolerance))
    losses = problem.weighted.at(problem.meta_params).losses({**params, **near}, batch)
    again = probe._replace(gradient=gradients((probe.signs * losses).sum(), near))
    here, there = probe.expected(along), again.expected(along)
    scale = max(abs(here), abs(there))
    return 10 * abs(there - here) >= min(error, 1.0) * scale


def is_faint(gradient: Gradients, params: Params, tolerance: float) -> bool:
    """Whether a gradient is so small, relative to the parameters, that it may be rounding only.

    A larger gradient that jumps between nudged parameters is no rounding: they may cross a step of the model.
    """
    felt = [name for name, g in gradient.items() if g is not None]
    size = norm(gradient[name] for name in felt) * norm(params[name] for name in felt)
    return size <= tolerance / 10


def nudged(params: Params, tolerance: float) -> Params:
    """Parameters moved by a few roundings of arithmetic with this tolerance, up or down."""
    delta = 8 * (tolerance / 10) ** 2
    generator = _generator()
    signs = {name: torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1 for name, p in params.items()}
    return {name: p.detach() * (1 + delta * signs[name]) for name, p in params.items()}


def _signs(losses: Tensor, names: Collection[str]) -> Iterator[tuple[str | None, Tensor]]:
    """Random signs over the samples for each term, then for all terms together."""
    signs = torch.randint(2, losses.shape, generator=_generator()).to(losses) * 2 - 1
    for k, name in enumerate(names):
        yield name, signs * (torch.arange(losses.shape[1], device=losses.device) == k)
    yield None, signs


def _layer(probe: _Probe, along: Callable[[Params], Tensor]) -> str | None:
    """The module whose parameter is the last with a wrong tangent, by bisection over the parameters' order."""
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
    except Exception:  # a partial direction may fail; the disagreement is valid without a layer
        return None
    return (names[low].rpartition(".")[0] or names[low]) if names else None


def _generator() -> torch.Generator:
    """A generator of its own: the global one belongs to the training."""
    return torch.Generator().manual_seed(0)
