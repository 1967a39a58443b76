"""torch.optim.Muon."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.inner.rules.base import Group, Rule, State, moved
from metakd.inner.updates import mean


def orthogonalised(g: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Muon's Newton-Schulz iteration, which brings the singular values of a matrix near 1.

    From X = g / max(|g|, eps), in the Frobenius norm, each step takes X to a X + (b X X^T + c (X X^T)^2) X.
    torch computes it in bfloat16. Here it runs in the dtype of g, float32 or finer, so both agree to bfloat16 rounding.
    For g = 0 the derivative is that of the iteration over eps.

    Source: Keller Jordan's Muon, as in torch.optim.Muon.
    """
    a, b, c = coefficients
    x: Tensor = g.to(torch.promote_types(g.dtype, torch.float32))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(g.dtype)


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    if group["adjust_lr_fn"] not in _RATIOS:
        raise MetaKDError(
            f"inner='mirror' does not know Muon's adjust_lr_fn={group['adjust_lr_fn']!r}; use one of {list(_RATIOS)}, "
            "or inner='sgd'"
        )
    return {"momentum_buffer": _zero_matrix}


def _zero_matrix(p: Tensor) -> Tensor:
    if p.ndim != 2:  # the real view of a complex matrix, which Muon's own step refuses
        raise MetaKDError(
            f"inner='mirror' met a parameter in Muon that is no real matrix, but of shape {tuple(p.shape)} (a complex "
            "one has its parts in the last dimension); give it to another optimizer, such as AdamW"
        )
    return torch.zeros_like(p)


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    momentum = group["momentum"]
    buffer = mean(state["momentum_buffer"], g, momentum)
    ahead = mean(buffer, g, momentum) if group["nesterov"] else buffer
    direction = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
    rate = group["lr"] * _RATIOS[group["adjust_lr_fn"]](*p.shape)
    return moved(direction, p, group, rate), {"momentum_buffer": buffer}


def _original(rows: int, columns: int) -> float:
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def _as_adamw(rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns))


_RATIOS = {None: _original, "original": _original, "match_rms_adamw": _as_adamw}

MUON = Rule(
    ("lr", "momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "weight_decay", "adjust_lr_fn"),
    _start,
    _step,
    ("decoupled_weight_decay",),
)
