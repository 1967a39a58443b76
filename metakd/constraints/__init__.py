"""Maps from free numbers to constrained ones, for meta-parameters and other learned numbers.

Each is an `nn.Module` with `forward` (free -> constrained) and `right_inverse` (constrained -> free). Call it inside
the inner loss, or pass it to `torch.nn.utils.parametrize.register_parametrization`.
"""

from metakd.constraints.bounded_eigenvalues import BoundedEigenvalues
from metakd.constraints.positive import Positive
from metakd.constraints.simplex import Simplex

__all__ = ["BoundedEigenvalues", "Positive", "Simplex"]
