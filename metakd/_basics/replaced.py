"""Blocks in which other functions run in place of torch's: one mode, however many such blocks are open."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodWrapperType
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode

Functions = Mapping[Any, Callable[..., Any]]
"""A function of torch -> what is called in its place."""


class _Mode(TorchFunctionMode):
    """Torch calls it for every function and for every attribute that is read of a tensor, so it does little.

    Attributes:
        functions: what runs in place of others.
        first: runs before each function.
    """

    def __init__(self, functions: Functions, first: Callable[[], object] | None) -> None:
        super().__init__()
        self.functions, self.first = functions, first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func) is MethodWrapperType:  # an attribute
            return func(*args)
        if self.first is not None:
            self.first()
        found = self.functions.get(func, func)
        return found(*args, **kwargs) if kwargs else found(*args)


@contextmanager
def replaced(functions: Functions, first: Callable[[], object] | None = None) -> Iterator[None]:
    """A block in which functions of torch are replaced, and `first` runs before each, in addition to blocks around it.

    What runs in place of a function, or is called by a function of torch, finds torch's own functions.

    Examples:
        >>> import torch
        >>> with replaced({torch.sin: torch.cos}), replaced({torch.exp: torch.sin}):
        ...     torch.sin(torch.zeros(1)), torch.exp(torch.zeros(1))
        (tensor([1.]), tensor([0.]))
    """
    mode = _get_current_function_mode()
    if not isinstance(mode, _Mode):
        with _Mode(functions, first):
            yield
        return
    kept = mode.functions, mode.first
    mode.functions, mode.first = {**mode.functions, **functions}, first or mode.first
    try:
        yield
    finally:
        mode.functions, mode.first = kept
