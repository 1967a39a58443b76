"""Per-sample losses. A term is any callable `(outputs, batch) -> (B,)` tensor; these are the usual ones."""

from metakd.terms.base import Term, evaluate, named
from metakd.terms.cross_entropy import CrossEntropy
from metakd.terms.prior import BalancedSoftmax, LogitAdjusted
from metakd.terms.reading import logits
from metakd.terms.soft_target import ReverseSoftTarget, SoftTarget

__all__ = [
    "BalancedSoftmax",
    "CrossEntropy",
    "LogitAdjusted",
    "ReverseSoftTarget",
    "SoftTarget",
    "Term",
    "evaluate",
    "logits",
    "named",
]
