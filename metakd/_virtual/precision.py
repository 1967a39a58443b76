"""What `torch.autocast` around a balancer means for virtual passes.

Under bfloat16 they run like the training pass, as bfloat16 has float32's range. Under float16 they run without
autocast: tangents and unscaled gradients are below its smallest number. Backward passes, the inner optimizer and
the weight model always run without autocast.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from metakd._autodiff import graph_nodes

HALF = (torch.float16, torch.bfloat16)


def as_written(kind: str) -> AbstractContextManager[None]:
    """A block without autocast on a device type: operations run in the dtypes of their tensors."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def virtual_autocast(kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Capture the autocast setting of here and now; returns blocks that apply it to virtual passes."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(_autocast, kind, torch.get_autocast_dtype(kind))


def autocasts_to_float16(kind: str) -> bool:
    """Whether autocast to float16 is on."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def ran_in_float16(outputs: Iterable[Tensor]) -> bool:
    """Whether gradients on their way from the outputs to the parameters pass through float16."""
    seen: set[object] = set()
    nodes = (node for t in outputs for node in graph_nodes(t, seen))
    return any(m.dtype == torch.float16 for node in nodes for m in getattr(node, "_input_metadata", ()))


def widened(values: Tensor) -> Tensor:
    """Half precision as float32; other dtypes unchanged."""
    return values.float() if values.dtype in HALF else values


@contextmanager
def _autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(kind, dtype, enabled=dtype == torch.bfloat16):
        yield
    # The cache would keep the casts of every virtual step's parameters until the user's own block ends.
    torch.clear_autocast_cache()
