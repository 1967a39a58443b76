"""Numbers that are positive and sum to one."""

import torch
from torch import Tensor, nn

from metakd.errors import MetaKDError


class Simplex(nn.Module):
    """Positive numbers that sum to one over a dimension: the softmax of free numbers.

    Adding a constant to the free numbers changes nothing; `right_inverse` returns those whose exponentials sum to one.

    Shapes: any.

    Args:
        dim: the dimension that sums to one.

    Raises:
        MetaKDError: `right_inverse` of numbers that are not positive or do not sum to one.

    Examples:
        >>> shares = Simplex()
        >>> shares(torch.tensor([0.0, 0.0, 0.0, 0.0]))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> shares(shares.right_inverse(torch.tensor([0.2, 0.8])))
        tensor([0.2000, 0.8000])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, free: Tensor) -> Tensor:
        """Return the shares, the shape of `free`."""
        return free.softmax(self.dim)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return free numbers that `forward` maps to `value`, same shape."""
        total = value.sum(self.dim)
        tolerance = 10 * torch.finfo(value.dtype).eps ** 0.75
        if not bool((value > 0).all()) or not bool(((total - 1).abs() <= tolerance).all()):
            raise MetaKDError(
                f"Simplex cannot start at a tensor with smallest entry {value.min().item():g} and sums from "
                f"{total.min().item():g} to {total.max().item():g} over dim {self.dim}: entries must be positive and "
                "sum to one; use a softmax, or value / value.sum(dim, keepdim=True)"
            )
        return value.log()
