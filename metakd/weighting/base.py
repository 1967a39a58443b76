"""What weight models share: the maps from a free number to a weight, and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd.errors import MetaKDError


@dataclass(frozen=True)
class OutputMap:
    """A differentiable map from free numbers `(..., M)` to weights `(..., M)`.

    Attributes:
        apply: the map.
        inverse: the free number that a weight comes from.
        lower: weights are above this.
        upper: weights are below this.
    """

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[float], float]
    lower: float = -math.inf
    upper: float = math.inf


_MAPS = {
    "sigmoid": OutputMap(torch.sigmoid, lambda w: math.log(w) - math.log1p(-w), lower=0.0, upper=1.0),
    "softplus": OutputMap(F.softplus, lambda w: w + math.log(-math.expm1(-w)), lower=0.0),
    # Equal free numbers make equal weights, whatever weight was asked for.
    "softmax": OutputMap(lambda free: F.softmax(free, dim=-1), lambda w: 0.0),
    "identity": OutputMap(lambda free: free, lambda w: w),
}


def output_map(output: str) -> OutputMap:
    """Look an output map up by name.

    Args:
        output: `"sigmoid"` (each weight in (0, 1), on its own), `"softplus"` (each positive),
            `"softmax"` (positive, summing to one over the terms) or `"identity"` (any number).

    Raises:
        MetaKDError: there is no such map.

    Examples:
        >>> output_map("sigmoid").inverse(0.5)
        0.0
    """
    if output not in _MAPS:
        raise MetaKDError(f"there is no output map {output!r}; use one of {', '.join(map(repr, _MAPS))}")
    return _MAPS[output]


def starting_point(init: float | None, output: str) -> float:
    """Return the free number whose weight is `init`.

    Raises:
        MetaKDError: no number maps to that weight.

    Examples:
        >>> round(starting_point(1.0, "softplus"), 4)
        0.5413
    """
    chosen = output_map(output)
    if output == "softmax":
        return 0.0
    if init is None or not (math.isfinite(init) and chosen.lower < init < chosen.upper):
        raise MetaKDError(
            f"no weight can start at init={init} with output={output!r}: it must be finite and in "
            f"({chosen.lower:g}, {chosen.upper:g}); change init, or the output map"
        )
    return chosen.inverse(float(init))


def shares(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The values over their sum over some dimensions; zero where that is zero.

    Examples:
        >>> shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), dim=(1,))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    total = values.sum(dim=dim, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def positive_int(value: int, name: str) -> int:
    """Return the value if it is an integer of at least 1.

    Raises:
        MetaKDError: it is not.

    Examples:
        >>> positive_int(3, "terms")
        3
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < 1:
        raise MetaKDError(f"{name} is {value!r}, it must be an integer of at least 1")
    return index(value)
