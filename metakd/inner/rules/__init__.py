"""The update rules of torch.optim, one per file, by optimizer class."""

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.inner.groups import Held, required_rate
from metakd.inner.rules.adagrad import ADAGRAD
from metakd.inner.rules.adam import ADAM, ADAMW
from metakd.inner.rules.base import Group, Rule, State
from metakd.inner.rules.muon import MUON
from metakd.inner.rules.nadam import NADAM
from metakd.inner.rules.radam import RADAM
from metakd.inner.rules.rmsprop import RMSPROP
from metakd.inner.rules.sgd import SGD

__all__ = ["Group", "Rule", "State", "rule_of"]

_NAMED = {
    "SGD": SGD,
    "Adam": ADAM,
    "AdamW": ADAMW,
    "RMSprop": RMSPROP,
    "Adagrad": ADAGRAD,
    "NAdam": NADAM,
    "RAdam": RADAM,
    "Muon": MUON,
}
# By class, not by name: a subclass may behave differently. Older torch has no Muon.
_RULES = {getattr(torch.optim, name): rule for name, rule in _NAMED.items() if hasattr(torch.optim, name)}

_KERNELS = {"foreach", "fused", "capturable", "differentiable"}
"""Flags that choose a kernel and do not change the update."""

_ELSE = "Use inner='sgd', or pass a torchopt GradientTransformation as inner="


def rule_of(held: Held) -> tuple[Rule, Group]:
    """Return the rule that a group of parameters follows, with its current settings; raise if no rule fits."""
    kind = type(held.optimizer)
    rule = _RULES.get(kind)
    if rule is None:
        supported = ", ".join(f"torch.optim.{known.__name__} ({', '.join(r.flags)})" for known, r in _RULES.items())
        raise MetaKDError(f"inner='mirror' cannot follow {kind.__name__}; it supports {supported}. {_ELSE}")
    unknown = held.optimizer.defaults.keys() - {*rule.flags, *_KERNELS}
    if on := sorted(flag for flag in unknown if held.group.get(flag)):
        raise MetaKDError(
            f"inner='mirror' does not know {on[0]}={held.group[on[0]]!r} of {kind.__name__}; it follows {rule.flags}. "
            f"Switch {on[0]} off. {_ELSE}"
        )
    settings = {name: float(value) if isinstance(value, Tensor) else value for name, value in held.group.items()}
    return rule, {**dict.fromkeys(rule.implied, True), **settings, "lr": required_rate(held)}
