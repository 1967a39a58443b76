"""First and second derivatives of a scalar by name, and the walk over autograd's graph."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError

Params = dict[str, Tensor]
"""Tensors by name: parameters, or meta-parameters."""

Gradients = dict[str, Tensor | None]
"""A gradient by name; None where nothing depends on a tensor."""


class NoSecondDerivative(MetaKDError):
    """A loss that cannot be differentiated twice.

    Examples:
        >>> raise NoSecondDerivative("the derivative of x_backward is not implemented")
        Traceback (most recent call last):
        ...
        metakd._autodiff.NoSecondDerivative: the derivative of x_backward is not implemented; reverse mode would ...
    """

    @property
    def fact(self) -> str:
        """What was seen, without the advice."""
        return str(self.args[0])

    @property
    def advice(self) -> str:
        """What to do about the operation that was seen."""
        known = (way for words, way in _OTHER_WAYS.items() if words in self.fact)
        way = next(known, "write it as other operations that compute the same")
        return f"{way}, or use estimators.FiniteDifference()"

    def __str__(self) -> str:
        return f"{self.fact}; reverse mode would have to differentiate it twice: {self.advice}"


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


def leaves(values: Params) -> Params:
    """The same values as fresh leaves of autograd."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """The gradients of a scalar by name, dense; None where the loss does not reach a parameter."""
    if not loss.requires_grad or not params:
        return dict.fromkeys(params)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return dense(dict(zip(params, found, strict=True)))


def dense(values: Gradients) -> Gradients:
    """The same with sparse gradients filled up, as `nn.Embedding(sparse=True)` gives them."""
    return {n: g.to_dense() if g is not None and g.layout != torch.strided else g for n, g in values.items()}


def in_both(
    loss: Tensor, params: Params, meta_params: Params, take: Callable[[Tensor, Params], Gradients] = gradients
) -> tuple[Gradients, Gradients]:
    """The gradients of a scalar in params and in meta_params, from one backward pass; the two may share names."""
    both = {f"theta.{name}": p for name, p in params.items()} | {f"phi.{name}": p for name, p in meta_params.items()}
    found = take(loss, both)
    return {name: found[f"theta.{name}"] for name in params}, {name: found[f"phi.{name}"] for name in meta_params}


def added(a: Gradients, b: Gradients) -> Gradients:
    """The sum of two gradients with the same names, where None is nothing."""
    pairs = {name: (value, b[name]) for name, value in a.items()}
    return {name: y if x is None else x if y is None else x + y for name, (x, y) in pairs.items()}


def norm(values: Iterable[Tensor | None]) -> float:
    """The Euclidean norm of tensors together, in float64; None is nothing."""
    return math.sqrt(math.fsum(float(v.detach().double().square().sum()) for v in values if v is not None))


def filled(values: Gradients, like: Params) -> Params:
    """The gradients of the names in `like`, with zeros in place of None."""
    return {name: torch.zeros_like(p) if (g := values[name]) is None else g for name, p in like.items()}


def slope(gradient: Mapping[str, Tensor | None], along: Mapping[str, Tensor | None]) -> Tensor | None:
    """The inner product of a gradient and a direction, over what both have; None where that is nothing."""
    pairs = [(g, u) for name, g in gradient.items() if g is not None and (u := along.get(name)) is not None]
    return torch.stack([(g * u).sum() for g, u in pairs]).sum() if pairs else None


def graph_gradients(loss: Tensor, params: Params) -> Gradients:
    """`gradients` with a graph of their own."""
    return gradients(loss, params, create_graph=True)


def second_order_gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """`gradients` of a scalar that was built from gradients.

    The backward pass worked once, so whatever fails here is a second derivative that is missing.

    Raises:
        NoSecondDerivative: an operation on the way has no second derivative.
    """
    try:
        return gradients(loss, params, **options)
    except (MetaKDError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoSecondDerivative(f"the second derivative of an inner step fails ({first_line(error)})") from error


def reject_once_differentiable(loss: Tensor, seen: set[Any] | None = None) -> None:
    """Make sure that a loss can be differentiated twice, as far as Python sees.

    Args:
        loss: a scalar with a graph.
        seen: nodes of the graph that need no look any more; new ones are added.

    Raises:
        NoSecondDerivative: an operation on the way is marked @once_differentiable. Where its incoming gradient is
            constant, autograd would lose what hangs behind it without a word.
    """
    for node in graph_nodes(loss, seen):
        reject_marked(node)


def reject_marked(node: Any) -> None:
    """See `reject_once_differentiable`, for one node of a graph."""
    operation = getattr(type(node), "_forward_cls", None)
    # The mark is a wrapper that torch's own module defines around the user's backward. The library's own operations
    # are twice differentiable, and mark the second time.
    if operation is None or operation.__module__.startswith("metakd."):
        return
    if getattr(operation.backward, "__globals__", {}).get("__name__") == "torch.autograd.function":
        raise NoSecondDerivative(f"{operation.__name__}.backward is marked @once_differentiable")


def first_line(error: BaseException) -> str:
    """What the first error of a chain says, shortened.

    Examples:
        >>> first_line(KeyError())
        'KeyError'
    """
    first = list(_chain(error))[-1]
    lines = str(first).splitlines()
    return lines[0][:160] if lines else type(first).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


_OTHER_WAYS = {
    "attention": "run it with the kernel torch.nn.attention.SDPBackend.MATH",
    "cdist": "take distances by torch.linalg.vector_norm(x[:, None] - y, dim=-1)",
    "pdist": "take distances by torch.linalg.vector_norm(x[:, None] - x, dim=-1)",
    "ctc_loss": "write the sum over alignments with torch.logsumexp",
    "sparse COO": "make the dense tensor, or take tensor.to_sparse(), which is right",
    "@once_differentiable": "write that backward with operations of torch, without the mark",
}
