"""What an operation of a random inner loss is, and helpers to write one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """`function(x, a)`: features (B, D) and an operand (D, D) to anything of B rows or none, twice differentiable.

    Attributes:
        name: as in the registry.
        function: pure but for draws from torch's global generator.
        by_autograd: what autograd says is not the derivative of the values (hooks, detached parts, straight-through):
            the reference is autograd's own double backward, not differences.
        needs_weights: the operand must be the weights themselves, real ones.
        wrong_in_torch: torch's double backward is wrong without a word.
    """

    name: str
    function: Function
    by_autograd: bool = False
    needs_weights: bool = False
    wrong_in_torch: bool = False


OPERATIONS: dict[str, Operation] = {}


def operation(function: Function | None = None, **marks: bool):
    """Register a function under its name, with the marks of an `Operation`."""

    def register(made: Function) -> Function:
        name = made.__name__.strip("_")
        assert name not in OPERATIONS, name
        OPERATIONS[name] = Operation(name, made, **marks)
        return made

    return register if function is None else register(function)


def operations(marks: dict[str, bool] | None = None, /, **functions: Function) -> None:
    """Register several short ones, all with the same marks."""
    for name, function in functions.items():
        assert name not in OPERATIONS, name
        OPERATIONS[name] = Operation(name, function, **(marks or {}))


def spread(x: Tensor, *shape: int) -> Tensor:
    """The features (B, D) as (B, *shape): repeated, each time at another scale."""
    count = torch.Size(shape).numel()
    scale = torch.linspace(0.7, 1.3, count, dtype=x.dtype)
    return (x[:, torch.arange(count) % x.shape[1]] * scale).reshape(-1, *shape)


def shaped(a: Tensor, *shape: int) -> Tensor:
    """The operand's numbers, repeated at other scales, in another shape."""
    count = torch.Size(shape).numel()
    scale = torch.linspace(0.7, 1.3, count, dtype=a.dtype)
    return (a.reshape(-1)[torch.arange(count) % a.numel()] * scale).reshape(shape)


def eye(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype)


def grid(*shape: int) -> Tensor:
    """Constants between -1 and 1 without a pattern."""
    return torch.sin(torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64) * 1.7).reshape(shape)


def picks(rows: int, columns: int, below: int) -> Tensor:
    """Integer constants below a bound, with repetitions."""
    return (torch.arange(rows)[:, None] * 5 + torch.arange(columns) * 3 + 1) % below
