"""Derivatives of a function of one number by central differences."""

import sys
from collections.abc import Callable
from typing import NamedTuple


class Slope(NamedTuple):
    """A derivative by differences, and how far these disagree among themselves."""

    value: float
    spread: float


def derivative(function: Callable[[float], float], *, step: float = 5e-2, shrink: float = 2.0, rows: int = 8) -> float:
    """The value of `slope_at_zero`."""
    return slope_at_zero(function, step=step, shrink=shrink, rows=rows).value


def slope_at_zero(
    function: Callable[[float], float], *, step: float = 5e-2, shrink: float = 2.0, rows: int = 8
) -> Slope:
    """The derivative at 0 by central differences, extrapolated to a step of zero.

    Richardson's extrapolation removes the errors in h^2, h^4, ... from a tableau of (f(h) - f(-h)) / 2h at shrinking h.
    The entry with the smallest distance to its neighbours, plus its rounding, wins. Source: Ridders, "Accurate
    computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software (1982). Ours differs in counting the
    rounding and in trying all h, as early agreement may be chance.

    Args:
        function: evaluated at +-h, in float64.
        step: the largest h.
        shrink: the factor between one h and the next.
        rows: the number of h.

    Examples:
        >>> import math
        >>> abs(slope_at_zero(lambda h: math.exp(1 + h)).value - math.e) < 1e-12
        True
    """
    best, smallest = float("nan"), float("inf")
    previous: list[float] = []
    for row in range(rows):
        h = step / shrink**row
        ahead, behind = function(h), function(-h)
        rounding = sys.float_info.epsilon * max(abs(ahead), abs(behind)) / h
        current = [(ahead - behind) / (2 * h)]
        for order, coarser in enumerate(previous, start=1):
            factor = shrink ** (2 * order)
            current.append((factor * current[-1] - coarser) / (factor - 1))
        for order in range(1, len(current)):
            spread = max(abs(current[order] - current[order - 1]), abs(current[order] - previous[order - 1]))
            if spread + rounding <= smallest:
                best, smallest = current[order], spread + rounding
        previous = current
    return Slope(best, smallest)
