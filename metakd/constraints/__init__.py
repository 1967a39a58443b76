"""Maps from free numbers to constrained ones, for meta-parameters and anything else that is learned.

Each is an `nn.Module` with a `forward` (free -> constrained) and a `right_inverse` (constrained -> free): call it
inside of the inner loss, or hand it to `torch.nn.utils.parametrize.register_parametrization`.
"""

from metakd.constraints.bounded_eigenvalues import BoundedEigenvalues
from metakd.constraints.positive import Positive
from metakd.constraints.simplex import Simplex

__all__ = ["BoundedEigenvalues", "Positive", "Simplex"]
