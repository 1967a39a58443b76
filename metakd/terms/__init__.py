"""Per-sample losses. A term is any callable `(outputs, batch) -> (B,)` tensor; the classes here are common ones."""

from metakd.terms.base import Term, evaluate, named
from metakd.terms.cross_entropy import CrossEntropy
from metakd.terms.debiased import DebiasedSoftTarget
from metakd.terms.decoupled import NonTargetClass, TargetClass
from metakd.terms.gated import GatedSoftTarget
from metakd.terms.groups import GroupTarget, WithinGroupTarget
from metakd.terms.prior import BalancedSoftmax, LogitAdjusted
from metakd.terms.reading import logits
from metakd.terms.rebalanced import RebalancedSoftTarget
from metakd.terms.soft_target import ReverseSoftTarget, SoftTarget
from metakd.terms.tokens import Tokens, tokens_as_samples

__all__ = [
    "BalancedSoftmax",
    "CrossEntropy",
    "DebiasedSoftTarget",
    "GatedSoftTarget",
    "GroupTarget",
    "LogitAdjusted",
    "NonTargetClass",
    "RebalancedSoftTarget",
    "ReverseSoftTarget",
    "SoftTarget",
    "TargetClass",
    "Term",
    "Tokens",
    "WithinGroupTarget",
    "evaluate",
    "logits",
    "named",
    "tokens_as_samples",
]
