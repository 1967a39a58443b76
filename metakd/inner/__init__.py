"""The differentiable inner optimizer, and the only door to TorchOpt, which is imported where it is needed alone.

An inner optimizer is a `GradientTransformation`, ours or TorchOpt's. `plain_sgd` and `mirror` build one from the
student's torch optimizers (`optimizers`, `param_groups` and `learning_rate` read them), `inner_optimizer` chooses
between them, `repaired` fixes errors of TorchOpt's transformations, and `apply` takes one differentiable step.
`conjugate_gradient` and `neumann_series` solve linear systems.
"""

from metakd._autodiff import Params
from metakd.inner.choose import inner_optimizer
from metakd.inner.groups import learning_rate, optimizers, param_groups
from metakd.inner.linear_solvers import conjugate_gradient, neumann_series
from metakd.inner.mirror import InnerOptimizer, mirror, plain_sgd
from metakd.inner.real import as_real
from metakd.inner.repaired import own, repaired
from metakd.inner.step import apply
from metakd.inner.transformation import GradientTransformation

__all__ = [
    "GradientTransformation",
    "InnerOptimizer",
    "Params",
    "apply",
    "as_real",
    "conjugate_gradient",
    "inner_optimizer",
    "learning_rate",
    "mirror",
    "neumann_series",
    "optimizers",
    "own",
    "param_groups",
    "plain_sgd",
    "repaired",
]
