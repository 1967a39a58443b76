"""Complex tensors as torch.optim sees them: as two real numbers an entry."""

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """The real view of a complex tensor, real and imaginary parts in a last dimension of 2; a real tensor itself.

    Args:
        tensor: complex (...) or real (...).

    Returns:
        (..., 2) for a complex tensor, sharing its memory; else the tensor itself.

    Examples:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
        >>> as_real(torch.tensor([1.0]))
        tensor([1.])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
