"""Shared by the weight models: maps from free numbers to weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "softmax": OutputMap(lambda free: F.softmax(free, dim=-1), lambda w: 0.0),
    "identity": OutputMap(lambda free: free, lambda w: w),
}


def up_to(top: float) -> OutputMap:
    """A sigmoid, times `top`."""
    return OutputMap(lambda free: top * torch.sigmoid(free), lambda w: math.log(w) - math.log(top - w), 0.0, top)


def output_map(output: str) -> OutputMap:
    """Return the output map of that name, or raise."""
    if output not in _MAPS:
        raise MetaKDError(
            f"there is no output map {output!r}; use one of {', '.join(map(repr, _MAPS))}; "
            "'bounded' is for tables and scalars"
        )
    return _MAPS[output]


class FreeNumbers(nn.Module):
    """Free numbers of any shape and their weights: what tables and scalars share.

    With `output="bounded"` the weights are `2 init sigmoid(a)`, between 0 and twice the start: larger weights are also
    a longer step of the student, which looks better to a one-step lookahead until the training diverges.
    """

    def __init__(self, shape: tuple[int, ...], init: float | None, output: str) -> None:
        super().__init__()
        if output != "softmax":  # which has no inverse for one weight: all start at zero, so uniform
            low, high = (0.0, math.inf) if output == "bounded" else (output_map(output).lower, output_map(output).upper)
            if init is None or not (math.isfinite(init) and low < init < high):
                raise MetaKDError(
                    f"no weight can start at init={init} with output={output!r}: it must be finite and in "
                    f"({low:g}, {high:g}); change init or the output map"
                )
        self.output, self.init = output, float(init or 0.0)
        self.free = nn.Parameter(torch.full(shape, self.output_map.inverse(self.init)))

    @property
    def output_map(self) -> OutputMap:
        """The map from free numbers to weights."""
        return up_to(2 * self.init) if self.output == "bounded" else output_map(self.output)

    def default_optimizer(self) -> torch.optim.Optimizer:
        """Adam(lr=0.1) without weight decay, which would pull every row of a table back at each step."""
        return fused_adam(self, lr=0.1)


def shares(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divide values by their sum over some dimensions; zero where the sum is zero."""
    total = values.sum(dim=dim, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a weight model asks for by its `default_optimizer()`, or else BiKD's Adam."""
    asked = getattr(model, "default_optimizer", None)
    found: torch.optim.Optimizer = fused_adam(model, lr=1e-3, weight_decay=1e-4) if asked is None else asked()
    return found


def fused_adam(model: nn.Module, **settings: Any) -> torch.optim.Adam:
    """Adam in one kernel where torch has it: the plain one waits for the host once per parameter."""
    params = list(model.parameters())
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return torch.optim.Adam(params, fused=fused, **settings)
