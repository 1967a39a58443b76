"""Where weights started, and the ends of their range, as far as the weight model tells."""

import math

import torch
from torch import Tensor, nn

from metakd.weighting import LossMLP, Pinned
from metakd.weighting.base import FreeNumbers, output_map

EDGE = 0.02  # a weight closer than this to an end of its range is saturated


def unpinned(model: nn.Module) -> nn.Module:
    """The weight model that learns."""
    return unpinned(model.model) if isinstance(model, Pinned) else model


def over_start(model: nn.Module, weights: Tensor) -> tuple[float | None, float | None]:
    """See `Numbers.scale` and `Numbers.scale_spread`."""
    model = unpinned(model)
    if isinstance(model, FreeNumbers):
        start = model.init
    elif isinstance(model, LossMLP):
        start = float(output_map(model.output).apply(torch.zeros(())))  # about: its last layer starts near zero
    else:
        return None, None
    if start == 0 or model.output == "softmax":  # whose weights have a fixed sum
        return None, None
    over = weights / start
    return float(over.mean()), float(over.std(correction=0))


def at_the_ends(model: nn.Module, weights: Tensor) -> tuple[list[float] | None, list[float] | None]:
    """The fraction of each term's weights at the ends of their range, if the model states its output map."""
    model = unpinned(model)
    output = getattr(model, "output", None)
    if isinstance(model, FreeNumbers) and output != "softmax":
        ends = model.output_map
    elif output in ("sigmoid", "softplus", "softmax"):
        ends = output_map("sigmoid" if output == "softmax" else output)
    else:
        return None, None
    if not math.isfinite(ends.lower):
        return None, None
    low = (weights < ends.lower + EDGE).double().mean(0).tolist()
    return low, (weights > ends.upper - EDGE).double().mean(0).tolist() if math.isfinite(ends.upper) else None
