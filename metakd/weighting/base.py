"""Shared by the weight models: maps from free numbers to weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.errors import MetaKDError


@dataclass(frozen=True)
class OutputMap:
    """A differentiable map from free numbers `(..., M)` to weights between `lower` and `upper`, and its inverse."""

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[float], float]
    lower: float = -math.inf
    upper: float = math.inf


_MAPS = {
    "sigmoid": OutputMap(torch.sigmoid, lambda w: math.log(w) - math.log1p(-w), lower=0.0, upper=1.0),
    "softplus": OutputMap(F.softplus, lambda w: w + math.log(-math.expm1(-w)), lower=0.0),
    # Softmax has no inverse for one weight: all start at zero, so uniform.
    "softmax": OutputMap(lambda free: F.softmax(free, dim=-1), lambda w: 0.0),
    "identity": OutputMap(lambda free: free, lambda w: w),
}


def output_map(output: str) -> OutputMap:
    """Return the output map of that name, or raise."""
    if output not in _MAPS:
        raise MetaKDError(f"there is no output map {output!r}; use one of {', '.join(map(repr, _MAPS))}")
    return _MAPS[output]


def starting_point(init: float | None, output: str) -> float:
    """Return the free number whose weight is `init`, or raise."""
    chosen = output_map(output)
    if output == "softmax":
        return 0.0
    if init is None or not (math.isfinite(init) and chosen.lower < init < chosen.upper):
        raise MetaKDError(
            f"no weight can start at init={init} with output={output!r}: it must be finite and in "
            f"({chosen.lower:g}, {chosen.upper:g}); change init or the output map"
        )
    return chosen.inverse(float(init))


def shares(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divide values by their sum over some dimensions; zero where the sum is zero."""
    total = values.sum(dim=dim, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)
