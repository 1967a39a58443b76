"""What a loss hangs on: a walk over autograd's graph."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_nodes(loss: Tensor, seen: set[Any] | None = None) -> Iterator[Any]:
    """All nodes of the graph that a loss hangs on, without those `seen` before, to which they are added."""
    seen, waiting = set() if seen is None else seen, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(function for function, _ in node.next_functions)


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """All leaves of autograd that a loss depends on.

    Examples:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> graph_leaves((w * w.detach()).sum())[0] is w
        True
    """
    variables = [node.variable for node in graph_nodes(loss) if hasattr(node, "variable")]
    return list({id(variable): variable for variable in variables}.values())
