"""Explains in plain words why a hypergradient and finite differences may disagree."""

import math
from collections.abc import Callable, Sequence

import torch

from metakd.check.finite_differences import Slope
from metakd.estimators import Estimator
from metakd.estimators.estimate import is_exact

Along = Callable[[float], float]


def hint(estimated: Sequence[float], slopes: Sequence[Slope], along: Along, estimator: Estimator, steps: int) -> str:
    """The likeliest cause of a disagreement in one tensor.

    Args:
        estimated: directional derivatives by the hypergradient.
        slopes: the same by finite differences.
        along: h -> the outer loss with the tensor moved by h along the first direction.
        estimator: the hypergradient's estimator.
        steps: K.
    """
    differences = [slope.value for slope in slopes]
    here, again = along(0.0), along(0.0)
    if here != again and not math.isnan(here):
        return (
            f"not a pure function: the same point gave {here:.9g} and then {again:.9g}; a loss draws random numbers or "
            "keeps a state"
        )
    if not all(map(math.isfinite, (*differences, along(5e-2), along(-5e-2)))):
        return "the outer loss is NaN or infinite close by; a logarithm, a root or a division left its domain"
    if not is_exact(estimator, steps):
        return f"{type(estimator).__name__} is an approximation; check it with a tolerance= that you accept"
    if here == float(torch.tensor(here, dtype=torch.float32)) and here != round(here, 3):
        return "the outer loss has float32 precision: something casts to it inside (.float(), a float32 constant)"
    if math.hypot(*estimated) <= 1e-9 * math.hypot(*differences):
        return "the estimate is zero: the losses use a cut copy of this tensor (.detach(), .item(), torch.no_grad())"
    right, left = (along(_NEAR) - here) / _NEAR, (here - along(-_NEAR)) / _NEAR
    if abs(right - left) > 0.05 * max(abs(right), abs(left)):
        return (
            f"a kink: the slope is {right:.3g} on one side and {left:.3g} on the other (ReLU, max, clamp, top-k, "
            "clipping at its threshold); there is no derivative here, so check at another point"
        )
    unsure = max(slope.spread / max(abs(slope.value), 1e-300) for slope in slopes)
    within = all(abs(e - slope.value) <= 100 * slope.spread for e, slope in zip(estimated, slopes, strict=True))
    if unsure > 1e-4 or within:
        return (
            f"kinks close by: the differences themselves are only accurate to {unsure:.0e}, at every step size (ReLU, "
            "max, clamp, batch statistics of few samples), so they cannot tell which is right. Check at another point, "
            "with a larger batch, or against estimators.Unroll()"
        )
    ratios = [e / d for e, d in zip(estimated, differences, strict=True) if d]
    if len(ratios) > 1 and ratios[0] and max(abs(r / ratios[0] - 1) for r in ratios) < 1e-3:
        return (
            f"the estimate is {ratios[0]:.4g} times the differences in every direction: a factor of the losses is cut "
            "from the graph (.detach(), .item()), or scales a gradient by hand"
        )
    return (
        "a stop-gradient: a part of the losses is cut from the graph (.detach(), torch.no_grad(), .data); or an "
        "operation's backward is wrong: try torch.autograd.gradcheck and gradgradcheck on your own autograd.Functions"
    )


_NEAR = 1e-8  # a kink farther away is not at the point itself
