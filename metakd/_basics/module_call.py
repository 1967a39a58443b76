"""Calling a module, or any other callable, with a batch's inputs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from metakd._basics.nest import tensors
from metakd._basics.sizes import described
from metakd.batch import arguments
from metakd.errors import MetaKDError


def call(module: Callable[..., Any], inputs: Any) -> Any:
    """Call a module with a batch's inputs: one argument, positional arguments, or keyword arguments.

    Args:
        module: the student, or a teacher, which may be any callable.
        inputs: `Batch.inputs`.

    Raises:
        MetaKDError: the module raised a TypeError, as for arguments that it does not take; or it failed, and the
            inputs' device or dtype differs from its own, or they are a single value that BatchNorm should take
            statistics of.

    Examples:
        >>> call(nn.Linear(3, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    args, kwargs = arguments(inputs)
    try:
        return module(*args, **kwargs)
    except torch.cuda.OutOfMemoryError:
        raise
    except TypeError as error:
        raise MetaKDError(
            f"{_name(module)} raised TypeError: {error}; it was called with {_listed(args, kwargs)}"
            f"{'' if _takes(module, args, kwargs) else _other_arguments(inputs)}"
        ) from error
    except (RuntimeError, ValueError) as error:
        if (cause := _cause(error, module, [*args, *kwargs.values()])) is None:
            raise
        raise MetaKDError(f"{_name(module)} cannot be called: {cause}") from error


def _cause(error: Exception, module: Callable[..., Any], inputs: list[Any]) -> str | None:
    if str(error).startswith("Expected more than 1 value per channel when training"):
        return f"{error}; leave out a last batch of size 1 (DataLoader(drop_last=True)), or put the layer in eval mode"
    own = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if own is None:
        return None
    anywhere = {id(packed.batch_sizes) for packed in inputs if isinstance(packed, PackedSequence)}  # always on the CPU
    for t in tensors(inputs):
        if t.device != own.device and id(t) not in anywhere:
            differ = f"its parameters are on {own.device}, its inputs on {t.device}; move the batch with .to(device)"
        elif t.is_floating_point() and t.dtype != own.dtype:
            differ = f"its parameters are {own.dtype}, its inputs {t.dtype}; cast the inputs, or use torch.autocast"
        else:
            continue
        return f"{differ} ({type(error).__name__}: {error})"
    return None


def _takes(module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is certain that the arguments fit, whatever went wrong with them inside."""
    try:
        signature = inspect.signature(module.forward if isinstance(module, nn.Module) else module)
        signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())


def _other_arguments(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return (
            ". A mapping's entries are keyword arguments: leave out those that it does not know, or give the mapping "
            "itself as Batch(inputs=(mapping,), ...), both through batch_fn="
        )
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        kind = type(inputs).__name__
        return (
            f". The elements of a {kind} are positional arguments: to give the {kind} itself, write "
            "Batch(inputs=(elements,), ...) in batch_fn="
        )
    return (
        ". To give it several inputs, write Batch(inputs=(x1, x2), targets=y) in batch_fn=: of an item (x1, x2, y) "
        "from the loader, x2 would be the targets and y the samples' positions in the training set"
    )


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())])


def _name(module: Callable[..., Any]) -> str:
    return getattr(module, "__name__", type(module).__name__)
