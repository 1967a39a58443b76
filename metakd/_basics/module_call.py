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

    Raises:
        MetaKDError: the module cannot take these inputs: their number, names, device or dtype, or a single sample
            that BatchNorm should take statistics of.
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
    """Explain an error inside a module by its inputs, if they are the reason."""
    if str(error).startswith("Expected more than 1 value per channel when training"):
        return f"{error}; leave out a last batch of size 1 (DataLoader(drop_last=True)), or put the layer in eval mode"
    own = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if own is None:
        return None
    # torch keeps the step sizes of packed sequences on the CPU, wherever the data is.
    anywhere = {id(packed.batch_sizes) for packed in inputs if isinstance(packed, PackedSequence)}
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
    """Whether the arguments certainly fit the signature, so that the TypeError came from inside the module."""
    try:
        signature = inspect.signature(module.forward if isinstance(module, nn.Module) else module)
        signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())


def _other_arguments(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return (
            ". A mapping's entries are keyword arguments: leave out those that the module does not know, or give the "
            "mapping itself as Batch(inputs=(mapping,), ...), both through batch_fn="
        )
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        kind = type(inputs).__name__
        return (
            f". The elements of a {kind} are positional arguments: to give the {kind} itself, write "
            "Batch(inputs=(elements,), ...) in batch_fn="
        )
    return (
        ". To give it several inputs, write Batch(inputs=(x1, x2), targets=y) in batch_fn=; without it, an item "
        "(x1, x2, y) means inputs x1, targets x2 and positions in the training set y"
    )


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())])


def _name(module: Callable[..., Any]) -> str:
    return getattr(module, "__name__", type(module).__name__)
