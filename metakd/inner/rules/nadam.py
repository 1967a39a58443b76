"""torch.optim.NAdam."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakd.inner.rules.base import Group, Rule, State, descent, moved, no_steps
from metakd.inner.updates import mean, mean_square, over_root


def _one(p: Tensor) -> Tensor:
    # In the precision that torch uses for it, whatever the parameter's.
    return torch.ones((), dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)


def _start(group: Group) -> dict[str, Callable[[Tensor], Any]]:
    return {"step": no_steps, "mu_product": _one, "exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}


def _step(g: Tensor, p: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    b1, b2 = (float(b) for b in group["betas"])
    t, g = state["step"] + 1, descent(g, p, group)
    now, later = (b1 * (1.0 - 0.5 * 0.96 ** (i * group["momentum_decay"])) for i in (t, t + 1))
    product = state["mu_product"].detach() * now
    m, v = mean(state["exp_avg"], g, b1), mean_square(state["exp_avg_sq"], g, b2)
    past = float(product)
    looking_ahead = (1.0 - now) / (1.0 - past) * g + later / (1.0 - past * later) * m
    direction = over_root(looking_ahead, v / (1.0 - b2**t), group["eps"])
    return moved(direction, p, group), {"step": t, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}


NADAM = Rule(
    ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize"), _start, _step
)
