"""Per-sample losses. A term is any callable `(outputs, batch) -> (B,)` tensor; the classes here are common ones."""

from metakd.terms.base import Term, evaluate, named
from metakd.terms.cross_entropy import CrossEntropy
from metakd.terms.debiased import DebiasedSoftTarget
from metakd.terms.decoupled import NonTargetClass, TargetClass
from metakd.terms.from_teacher import FromTeacher
from metakd.terms.gated import GatedSoftTarget
from metakd.terms.groups import GroupTarget, WithinGroupTarget
from metakd.terms.learned import LearnedSoftTarget, SmoothedCrossEntropy
from metakd.terms.prior import BalancedSoftmax, LogitAdjusted
from metakd.terms.reading import logits
from metakd.terms.rebalanced import RebalancedSoftTarget
from metakd.terms.robust import Bootstrapped, GeneralisedCrossEntropy
from metakd.terms.soft_target import ReverseSoftTarget, SoftTarget
from metakd.terms.tokens import Tokens, tokens_as_samples
from metakd.terms.transition import ForwardCorrected, estimated_transition
from metakd.terms.vector_scaled import VectorScaled

__all__ = [
    "BalancedSoftmax",
    "Bootstrapped",
    "CrossEntropy",
    "DebiasedSoftTarget",
    "ForwardCorrected",
    "FromTeacher",
    "GatedSoftTarget",
    "GeneralisedCrossEntropy",
    "GroupTarget",
    "LearnedSoftTarget",
    "LogitAdjusted",
    "NonTargetClass",
    "RebalancedSoftTarget",
    "ReverseSoftTarget",
    "SmoothedCrossEntropy",
    "SoftTarget",
    "TargetClass",
    "Term",
    "Tokens",
    "VectorScaled",
    "WithinGroupTarget",
    "estimated_transition",
    "evaluate",
    "logits",
    "named",
    "tokens_as_samples",
]
