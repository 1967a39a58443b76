"""metakd: learn, by exact meta-gradients, how much each loss term counts for each training sample."""

from metakd import constraints, estimators, plots, recipes, terms, weighting
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.check import check_hypergradient
from metakd.doctor import Diagnosis, diagnose
from metakd.errors import MetaKDError
from metakd.estimators import Hypergradient, hypergradient
from metakd.history import History
from metakd.learned import learned_weights
from metakd.report import Report
from metakd.validation import Finding, validate

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BilevelLossBalancer",
    "Diagnosis",
    "Finding",
    "History",
    "Hypergradient",
    "MetaKDError",
    "Report",
    "check_hypergradient",
    "constraints",
    "diagnose",
    "estimators",
    "hypergradient",
    "learned_weights",
    "plots",
    "recipes",
    "terms",
    "validate",
    "weighting",
]
