"""Forward-mode differentiation with dual numbers, one block at a time in the whole process."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from threading import RLock

import torch
from torch.autograd import forward_ad

from metakd._basics.replaced import Functions, replaced
from metakd.errors import MetaKDError
from metakd.estimators.dual_formulas import FORMULAS, make_dual, with_formula
from metakd.inner import Params

_LOCK = RLock()  # torch has one level of dual numbers for all threads


class LevelTaken(MetaKDError):
    """Another forward-mode differentiation is open, outside this library or around this call.

    Examples:
        >>> with forward_ad.dual_level(), dual_numbers():
        ...     pass
        Traceback (most recent call last):
        ...
        metakd.estimators.dual.LevelTaken: torch has one level of dual numbers for the whole process, and a block of ...
    """


@contextmanager
def dual_numbers() -> Iterator[None]:
    """A block of forward-mode differentiation, one thread at a time; raises `LevelTaken` if one is open elsewhere."""
    with _LOCK, ExitStack() as stack:
        try:
            stack.enter_context(forward_ad.dual_level())
        except RuntimeError as error:
            raise LevelTaken(_TAKEN) from error
        _script_decompositions()
        stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
        stack.enter_context(replaced(_RULES))
        yield


@cache
def _script_decompositions() -> None:
    """What torch does at its first dual number, without its warning that its own `torch.jit.script` is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script`")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def duals(params: Params, u: Params) -> Params:
    """Parameters as dual numbers with tangent u; those without an entry in u stay constant."""
    return {name: make_dual(p, u[name]) if name in u else p for name, p in params.items()}


def _set_grad_enabled(enabled: bool) -> None:
    """`torch.no_grad()` stops tangents, too, which torch alone lets pass."""
    if enabled != torch.is_grad_enabled():
        torch._C._set_fwd_grad_enabled(enabled)
    torch._C._set_grad_enabled(enabled)


_RULES: Functions = {
    torch._C._set_grad_enabled: _set_grad_enabled,
    **{func: partial(with_formula, func) for func in FORMULAS},
}
_TAKEN = (
    "torch has one level of dual numbers for the whole process, and a block of torch.autograd.forward_ad is open "
    "outside of this call or in another thread; end it first, or use reverse mode"
)
