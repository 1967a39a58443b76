"""metakd: learn, by exact meta-gradients, how much each loss term counts for each training sample."""

import sys

from metakd import constraints, estimators, recipes, terms, weighting
from metakd._basics.versions import show_versions
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.check import check_hypergradient
from metakd.errors import MetaKDError
from metakd.estimators import Hypergradient, hypergradient
from metakd.meta_set import meta_in_training
from metakd.monitor import Diagnosis, History, diagnose, export_weights, learned_weights, plots, tensorboard
from metakd.report import Report
from metakd.validation import Finding, validate

sys.modules.update({f"{__name__}.plots": plots, f"{__name__}.tensorboard": tensorboard})  # as modules of their own

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
    "export_weights",
    "hypergradient",
    "learned_weights",
    "meta_in_training",
    "plots",
    "recipes",
    "show_versions",
    "tensorboard",
    "terms",
    "validate",
    "weighting",
]
