"""How far two ways to the same derivative may be apart, by the precision of their arithmetic."""

import torch
from torch import Tensor

from metakd._autodiff import graph_nodes

CANCELLED = 1 / 100
"""Of a tolerance: what is left of it where an inner product cancels, relative to the lengths of the two vectors.

Measured on small and large networks with batch normalisation of 4 samples: rounding is up to 4e-7 of the lengths in
float32 and 1.3e-3 in bfloat16, where this allows 3e-5 and 3e-3."""


def tolerance(dtype: torch.dtype, device_type: str = "cpu") -> float:
    r"""The relative error from which on two derivatives disagree, $\min(0.3,\, 10 \sqrt\delta)$.

    $\delta$ is the dtype's rounding, on CUDA that of TF32 where float32 may be computed in it.

    Examples:
        >>> [f"{tolerance(dtype):.1e}" for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        ['1.5e-07', '3.5e-03', '3.0e-01']
    """
    delta = torch.finfo(dtype).eps
    if device_type == "cuda" and dtype == torch.float32 and _tf32():
        delta = 1e-3
    return float(min(0.3, 10 * delta**0.5))


def tolerance_of(losses: Tensor) -> float:
    """`tolerance` of the coarsest arithmetic on the way from parameters to losses with a graph, autocast included.

    Examples:
        >>> w = torch.ones(2, requires_grad=True)
        >>> round(tolerance_of((w.bfloat16() * 2).float().sum()), 3)
        0.3
    """
    metadata = [m for node in graph_nodes(losses) for m in getattr(node, "_input_metadata", ())]
    dtypes = {losses.dtype} | {m.dtype for m in metadata if m.dtype.is_floating_point}
    return max(tolerance(dtype, losses.device.type) for dtype in dtypes)


def as_share(error: float) -> str:
    """A relative error in words.

    Examples:
        >>> as_share(0.413), as_share(2.5e-4)
        ('41%', '2.5e-04 of its size')
    """
    return f"{error:.0%}" if 0.01 <= error < 10 else f"{error:.1e} of its size"


def _tf32() -> bool:
    """Whether products in float32 may be rounded to TF32; newer torch has names of its own for that."""
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # settings by the new names, which the old ones cannot express
        return True
