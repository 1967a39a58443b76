"""Hypergradient estimators, one a file, and `hypergradient` in front of them."""

from metakd.estimators.hypergradient import hypergradient
from metakd.estimators.one_step import OneStep
from metakd.estimators.problem import Estimator, Hypergradient, Problem
from metakd.estimators.unroll import Unroll

__all__ = ["Estimator", "Hypergradient", "OneStep", "Problem", "Unroll", "hypergradient"]
