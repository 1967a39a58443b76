"""Complex tensors as torch.optim treats them: as pairs of real numbers."""

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor's real view, whose last dimension holds real and imaginary parts; real tensors unchanged.

    Args:
        tensor: complex (...) or real (...).

    Returns:
        (..., 2) for a complex tensor, sharing its memory; otherwise the tensor itself.

    Examples:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
        >>> as_real(torch.tensor([1.0]))
        tensor([1.])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
