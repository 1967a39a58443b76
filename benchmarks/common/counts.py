"""Counts what a call launches and what it waits for: kernels and host syncs, through torch's dispatcher."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NO_KERNELS = {
    "detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "_make_dual", "_fw_primal", "is_same_size",
    "_has_same_storage_numel", "_efficientzerotensor", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
_SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "allclose"}
# On a CPU these read the memory directly, without an operation; on a GPU they wait for it.
_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class Counts(NamedTuple):
    """Kernels and host syncs of a call, by operation.

    A kernel is an operation that neither views nor allocates; an operation on a list of tensors is one. A host sync
    is an operation whose result Python needs.
    """

    kernels: Counter[str]
    syncs: Counter[str]


def count(call: Callable[[], object]) -> Counts:
    """Run a call and count.

    Examples:
        >>> x = torch.ones(3)
        >>> found = count(lambda: (x + 1).view(3, 1).sum().item())
        >>> dict(found.kernels), dict(found.syncs)
        ({'add': 1, 'sum': 1}, {'_local_scalar_dense': 1})
    """
    found = Counts(Counter(), Counter())
    with _Reads(found), _Operations(found):
        call()
    return found


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counts) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _SYNCS:
            self._found.syncs[name] += 1
        if name not in {"_local_scalar_dense", *_ALLOCATIONS, *_NO_KERNELS} and not func.is_view:
            self._found.kernels[name] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, found: Counts) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._found.syncs[func.__name__] += 1
        return func(*args, **(kwargs or {}))
