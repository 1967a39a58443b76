"""Replaces or refuses operations whose second derivatives torch gets wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metakd._autodiff import NoSecondDerivative, graph_nodes, reject_marked


def twice_differentiable(loss: Callable[[], Tensor], seen: set[Any] | None = None) -> Tensor:
    """Evaluate a pure loss so that its graph has right second derivatives, as far as is known.

    The second derivative of torch's fused weight normalisation treats the norm as a constant. A loss that uses it is
    evaluated again with the formula. Nodes in `seen` are not checked again; new ones are added.

    Raises:
        NoSecondDerivative: an operation is marked @once_differentiable, or has a wrong second derivative.

    Examples:
        >>> v, g = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.ones(1, 1)
        >>> loss = twice_differentiable(lambda: torch._weight_norm(v, g)[0, 0])
        >>> (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
        >>> torch.autograd.grad(gradient[0, 0], v)[0]  # d2 / dv2 of v_0 / |v|
        tensor([[-0.0461,  0.0026]])
    """
    value = loss()
    if not _is_right(value, seen):
        with _WrittenOut():
            value = loss()
        if not _is_right(value, seen):
            raise NoSecondDerivative("torch's second derivative of weight normalisation (_weight_norm) is wrong")
    return value


class _WrittenOut(TorchFunctionMode):
    """A block in which weight normalisation is the formula v g / |v|."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _is_right(loss: Tensor, seen: set[Any] | None) -> bool:
    for node in graph_nodes(loss, seen):
        if node.name() == "WeightNormInterfaceBackward0":
            return False
        if node.name() == "SparseCooTensorWithDimsAndTensorsBackward0":
            raise NoSecondDerivative("torch's second derivative of a sparse COO tensor in its values is wrong")
        reject_marked(node)
    return True
