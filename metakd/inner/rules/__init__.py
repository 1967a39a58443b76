"""The update rules of torch.optim, one a file, and which optimizer follows which."""

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
# By class and not by name, as a subclass may do anything; older torch has no Muon.
_RULES = {getattr(torch.optim, name): rule for name, rule in _NAMED.items() if hasattr(torch.optim, name)}

_KERNELS = {"foreach", "fused", "capturable", "differentiable"}
"""Flags that say how an update is computed, and not what it is."""

_ELSE = "Use inner='sgd', or pass a torchopt GradientTransformation as inner="


def rule_of(held: Held) -> tuple[Rule, Group]:
    """The rule that a group of parameters follows, with its settings at this moment.

    Raises:
        MetaKDError: no rule follows this optimizer, or one of its flags; or the group has no learning rate.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> rprop = torch.optim.Rprop([w])
        >>> rule_of(Held(rprop, 0, rprop.param_groups[0], ["w"]))
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: inner='mirror' cannot follow Rprop; it supports torch.optim.SGD (lr, ...
    """
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
