"""What `torch.autocast` around a balancer means for virtual passes.

In bfloat16 they run as the training pass does: it has the range of float32. In float16 they run without autocast: a
step's tangents, and gradients that no scaler lifts, are below its smallest number. Backward passes, the inner optimizer
and the weight model are out of autocast always.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from metakd._autodiff import graph_nodes

HALF = (torch.float16, torch.bfloat16)


def as_written(kind: str) -> AbstractContextManager[None]:
    """A block without autocast for a type of device: operations run in the types of their tensors.

    Examples:
        >>> with torch.autocast("cpu"), as_written("cpu"):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def virtual_autocast(kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Blocks for the virtual passes of what autocast asks for here and now, wherever they will be run.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     block = virtual_autocast("cpu")
        >>> with block():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(_autocast, kind, torch.get_autocast_dtype(kind))


def autocasts_to_float16(kind: str) -> bool:
    """Whether autocast to float16 is on."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def ran_in_float16(outputs: Iterable[Tensor]) -> bool:
    """Whether float16 is anywhere on the way of gradients from the outputs to the parameters.

    Examples:
        >>> w = torch.ones(1, 1, requires_grad=True)
        >>> ran_in_float16([(w.half() * 2).float()]), ran_in_float16([w.bfloat16() * 2])
        (True, False)
    """
    seen: set[object] = set()
    nodes = (node for t in outputs for node in graph_nodes(t, seen))
    return any(m.dtype == torch.float16 for node in nodes for m in getattr(node, "_input_metadata", ()))


def widened(values: Tensor) -> Tensor:
    """Half precision raised to float32, other types as they are.

    Examples:
        >>> widened(torch.ones(1).half()).dtype, widened(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return values.float() if values.dtype in HALF else values


@contextmanager
def _autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(kind, dtype, enabled=dtype == torch.bfloat16):
        yield
    # Else casts of each virtual step's parameters would be kept until the user's own block ends.
    torch.clear_autocast_cache()
