"""How far two computations of one derivative may differ, given their arithmetic's precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metakd._autodiff import graph_nodes

CANCELLED = 1 / 100
"""Share of a tolerance, relative to the vectors' lengths, that is allowed to an inner product that cancels.

Measured on small and large networks with batch normalisation of 4 samples: rounding is up to 4e-7 of the lengths in
float32 and 1.3e-3 in bfloat16, and this allows 3e-5 and 3e-3."""


OTHER_KERNELS = 1000
r"""By how much another kernel's sums may differ, in roundings.

ReLUs near zero turn differences of $\delta$ in activations into one of about $6 \sqrt\delta$ in the gradient of a
ResNet-20 in float32: 1e-3 if sums differ by a rounding, 6e-3 if by ten, 2e-2 if by a hundred."""


def tolerance(dtype: torch.dtype, device_type: str = "cpu", *, other_kernels: bool = False) -> float:
    r"""The largest relative error between two right derivatives, $\min(0.3,\, 10 \sqrt\delta)$.

    $\delta$ is the dtype's rounding; on CUDA it is TF32's if float32 may be computed in it, and `OTHER_KERNELS`
    roundings where the two may come from other kernels, such as cuDNN's and torch's own.

    Examples:
        >>> [f"{tolerance(dtype):.1e}" for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        ['1.5e-07', '3.5e-03', '3.0e-01']
        >>> f"{tolerance(torch.float64, 'cuda', other_kernels=True):.1e}"
        '4.7e-06'
    """
    delta = torch.finfo(dtype).eps * (OTHER_KERNELS if other_kernels and device_type == "cuda" else 1)
    if device_type == "cuda" and dtype == torch.float32 and _tf32():
        delta = max(delta, 1e-3)
    return float(min(0.3, 10 * delta**0.5))


def tolerance_of(losses: Tensor, *, other_kernels: bool = False) -> float:
    """`tolerance` of the coarsest arithmetic between parameters and losses, autocast included; needs the graph."""
    metadata = [m for node in graph_nodes(losses) for m in getattr(node, "_input_metadata", ())]
    dtypes = {losses.dtype} | {m.dtype for m in metadata if m.dtype.is_floating_point}
    return max(tolerance(dtype, losses.device.type, other_kernels=other_kernels) for dtype in dtypes)


@contextmanager
def full_float32() -> Iterator[bool]:
    """A block in which products in float32 are not rounded to TF32 or bfloat16; gives whether they were outside.

    Comparisons need it: rounded products allow only a `tolerance` of 0.3, and cuDNN rounds by default.

    Examples:
        >>> with full_float32() as rounded:
        ...     print(rounded)
        False
    """
    try:
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the user set newer names, which the old ones cannot express
        yield False
        return
    rounded = products != "highest" or (convolutions and torch.cuda.is_available())
    if not rounded:
        yield False
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield True
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def as_share(error: float) -> str:
    """A relative error in words."""
    return f"{error:.0%}" if 0.01 <= error < 10 else f"{error:.1e} of its size"


def _tf32() -> bool:
    """Whether products in float32 may be rounded to TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # the user set newer names, which the old ones cannot express
        return True
