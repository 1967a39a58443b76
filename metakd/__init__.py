"""metakd: learn, by exact meta-gradients, how much each loss term counts for each training sample."""

from metakd import estimators, terms, weighting
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.check import check_hypergradient
from metakd.errors import MetaKDError
from metakd.estimators import Hypergradient, hypergradient
from metakd.report import Report
from metakd.validation import Finding, validate

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BilevelLossBalancer",
    "Finding",
    "Hypergradient",
    "MetaKDError",
    "Report",
    "check_hypergradient",
    "estimators",
    "hypergradient",
    "terms",
    "validate",
    "weighting",
]
