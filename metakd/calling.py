"""Calling a module with a batch's inputs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from metakd.batch import tensors
from metakd.errors import MetaKDError


def call(module: nn.Module, inputs: Any, params: dict[str, Tensor] | None = None) -> Any:
    """Call a module with a batch's inputs: one tensor, positional arguments, or keyword arguments.

    Args:
        module: the student or the teacher.
        inputs: `Batch.inputs`.
        params: to use in place of the module's own, by name.

    Raises:
        MetaKDError: the call failed and the inputs' device or dtype differs from the module's, or it is a single value
            that BatchNorm should take statistics of.

    Examples:
        >>> import torch
        >>> call(nn.Linear(3, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    args, kwargs = _arguments(inputs)
    try:
        return module(*args, **kwargs) if params is None else functional_call(module, params, args, kwargs)
    except (RuntimeError, ValueError) as error:
        own = next(module.parameters(), None)
        if (cause := _cause(error, own, inputs)) is None:
            raise
        raise MetaKDError(f"{type(module).__name__} cannot be called: {cause}") from error


def _cause(error: Exception, own: Tensor | None, inputs: Any) -> str | None:
    if str(error).startswith("Expected more than 1 value per channel when training"):
        return f"{error}; leave out a last batch of size 1 (DataLoader(drop_last=True)), or put the layer in eval mode"
    for tensor in tensors(inputs):
        if own is not None and tensor.device != own.device:
            return f"its parameters are on {own.device}, its inputs on {tensor.device}; move the batch with .to(device)"
        if own is not None and tensor.is_floating_point() and tensor.dtype != own.dtype:
            return f"its parameters are {own.dtype}, its inputs {tensor.dtype}; cast the inputs, or use torch.autocast"
    return None


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})
