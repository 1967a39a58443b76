"""Hypergradient estimators, one a file, and `hypergradient` in front of them."""

from metakd.estimators.adjoint import Adjoint
from metakd.estimators.finite_difference import FiniteDifference
from metakd.estimators.hypergradient import hypergradient
from metakd.estimators.identity_jacobian import IdentityJacobian
from metakd.estimators.implicit import Implicit
from metakd.estimators.one_step import OneStep
from metakd.estimators.problem import Estimator, Hypergradient, Problem
from metakd.estimators.truncated import Truncated
from metakd.estimators.unroll import Unroll

__all__ = [
    "Adjoint",
    "Estimator",
    "FiniteDifference",
    "Hypergradient",
    "IdentityJacobian",
    "Implicit",
    "OneStep",
    "Problem",
    "Truncated",
    "Unroll",
    "hypergradient",
]
