"""First and second derivatives of a scalar by parameter name, and the walk over autograd's graph."""

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
    """A loss cannot be differentiated twice.

    Examples:
        >>> raise NoSecondDerivative("the derivative of x_backward is not implemented")
        Traceback (most recent call last):
        ...
        metakd._autodiff.NoSecondDerivative: the derivative of x_backward is not implemented; reverse mode would ...
    """

    @property
    def fact(self) -> str:
        """What went wrong, without the advice."""
        return str(self.args[0])

    @property
    def advice(self) -> str:
        """How to replace the operation."""
        known = (way for words, way in _OTHER_WAYS.items() if words in self.fact)
        way = next(known, "write it as other operations that compute the same")
        return f"{way}, or use estimators.FiniteDifference()"

    def __str__(self) -> str:
        return f"{self.fact}; reverse mode would have to differentiate it twice: {self.advice}"


def graph_nodes(loss: Tensor, seen: set[Any] | None = None) -> Iterator[Any]:
    """Iterate over the nodes of a loss's graph. Nodes in `seen` are skipped; new ones are added to it."""
    seen, waiting = set() if seen is None else seen, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(function for function, _ in node.next_functions)


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """All leaf tensors that a loss depends on."""
    variables = [node.variable for node in graph_nodes(loss) if hasattr(node, "variable")]
    return list({id(variable): variable for variable in variables}.values())


def leaves(values: Params) -> Params:
    """Copies of the values as fresh leaves of autograd."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def moved(params: Params, u: Params, step: float | Tensor) -> Params:
    """The parameters moved by `step * u`; those that u leaves out stay."""
    return {name: p + step * u[name] if name in u else p for name, p in params.items()}


def gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """Dense gradients of a scalar by name; None if the loss does not depend on a parameter."""
    if not loss.requires_grad or not params:
        return dict.fromkeys(params)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return dense(dict(zip(params, found, strict=True)))


def dense(values: Gradients) -> Gradients:
    """Make sparse gradients dense; `nn.Embedding(sparse=True)` gives such."""
    return {n: g.to_dense() if g is not None and g.layout != torch.strided else g for n, g in values.items()}


def joint_gradients(
    loss: Tensor, params: Params, meta_params: Params, take: Callable[[Tensor, Params], Gradients] = gradients
) -> tuple[Gradients, Gradients]:
    """Gradients of a scalar in params and in meta_params from one backward pass; the two may share names."""
    both = {f"theta.{name}": p for name, p in params.items()} | {f"phi.{name}": p for name, p in meta_params.items()}
    found = take(loss, both)
    return {name: found[f"theta.{name}"] for name in params}, {name: found[f"phi.{name}"] for name in meta_params}


def added(a: Gradients, b: Gradients) -> Gradients:
    """The sum of two gradients with the same names; None counts as zero."""
    pairs = {name: (value, b[name]) for name, value in a.items()}
    return {name: y if x is None else x if y is None else x + y for name, (x, y) in pairs.items()}


def norm(values: Iterable[Tensor | None]) -> float:
    """The Euclidean norm of several tensors together, in float64; None counts as zero."""
    return math.sqrt(math.fsum(float(v.detach().double().square().sum()) for v in values if v is not None))


def with_zeros(values: Gradients, like: Params) -> Params:
    """The gradients for the names in `like`, with zeros instead of None."""
    return {name: torch.zeros_like(p) if (g := values[name]) is None else g for name, p in like.items()}


def slope(gradient: Mapping[str, Tensor | None], along: Mapping[str, Tensor | None]) -> Tensor | None:
    """The inner product of a gradient and a direction over the names that both have; None if there are none."""
    pairs = [(g, u) for name, g in gradient.items() if g is not None and (u := along.get(name)) is not None]
    return torch.stack([(g * u).sum() for g, u in pairs]).sum() if pairs else None


def graph_gradients(loss: Tensor, params: Params) -> Gradients:
    """`gradients` with a graph, so that they can be differentiated again."""
    return gradients(loss, params, create_graph=True)


def second_order_gradients(loss: Tensor, params: Params, **options: Any) -> Gradients:
    """`gradients` of a scalar that was built from gradients.

    Raises:
        NoSecondDerivative: any failure, as the first derivatives have worked before.
    """
    try:
        return gradients(loss, params, **options)
    except (MetaKDError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoSecondDerivative(f"the second derivative of an inner step fails ({first_line(error)})") from error


def reject_once_differentiable(loss: Tensor, seen: set[Any] | None = None) -> None:
    """Raise `NoSecondDerivative` if the loss's graph has an operation marked @once_differentiable.

    Autograd reports it only if the incoming gradient needs a gradient itself, and drops terms silently otherwise.
    """
    for node in graph_nodes(loss, seen):
        reject_marked(node)


def reject_marked(node: Any) -> None:
    """`reject_once_differentiable` for one node of a graph."""
    operation = getattr(type(node), "_forward_cls", None)
    # The mark replaces backward by a wrapper that torch.autograd.function defines. This library's own operations mark
    # their second backward only.
    if operation is None or operation.__module__.startswith("metakd."):
        return
    if getattr(operation.backward, "__globals__", {}).get("__name__") == "torch.autograd.function":
        raise NoSecondDerivative(f"{operation.__name__}.backward is marked @once_differentiable")


def first_line(error: BaseException) -> str:
    """The first line of the error at the root of a chain, shortened."""
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
