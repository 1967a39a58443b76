"""The differentiable inner optimizer: the only door to TorchOpt.

An inner optimizer is a `torchopt.base.GradientTransformation`. `plain_sgd` and `mirror` build one from the
student's torch optimizer, `inner_optimizer` chooses, `repaired` mends what TorchOpt gets wrong in its own, `apply`
takes one differentiable step.
"""

from torchopt.base import GradientTransformation

from metakd.inner.choose import inner_optimizer
from metakd.inner.mirror import InnerOptimizer, mirror, plain_sgd
from metakd.inner.repaired import own, repaired
from metakd.inner.step import Params, apply

__all__ = [
    "GradientTransformation",
    "InnerOptimizer",
    "Params",
    "apply",
    "inner_optimizer",
    "mirror",
    "own",
    "plain_sgd",
    "repaired",
]
