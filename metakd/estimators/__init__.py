"""Hypergradient estimators, one per file, and the function `hypergradient` that calls them."""

from metakd.estimators.adjoint import Adjoint
from metakd.estimators.bilevel import hypergradient
from metakd.estimators.finite_difference import FiniteDifference
from metakd.estimators.identity_jacobian import IdentityJacobian
from metakd.estimators.implicit import Implicit
from metakd.estimators.memory import Memory
from metakd.estimators.one_step import OneStep
from metakd.estimators.problem import Estimator, Problem, WeightedLosses
from metakd.estimators.result import Hypergradient
from metakd.estimators.truncated import Truncated
from metakd.estimators.unroll import Unroll

__all__ = [
    "Adjoint",
    "Estimator",
    "FiniteDifference",
    "Hypergradient",
    "IdentityJacobian",
    "Implicit",
    "Memory",
    "OneStep",
    "Problem",
    "Truncated",
    "Unroll",
    "WeightedLosses",
    "hypergradient",
]
