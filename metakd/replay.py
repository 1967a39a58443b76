"""The products of the real forward pass, kept for the forward-mode pass over the same batch.

Forward mode carries a value and a tangent through the student; the values are those of the training pass. Where
convolutions and linear maps take them from there, a third of that pass's arithmetic is saved, and no second-order graph
is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metakd.batch import tensors

_PRODUCTS: set[Callable[..., Any]] = {
    F.linear,
    *(getattr(F, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
}
# What else networks are made of and draws no random numbers.
_OTHERS: set[Callable[..., Any]] = {
    *(F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm),
    *(F.relu, F.gelu, F.silu, F.embedding, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d),
    *(Tensor.add, Tensor.mul, Tensor.relu, torch.add, torch.mul, torch.relu),
}


class Product(NamedTuple):
    """One operation of the pass: which, its output, the version at which that was right, and statistics it updated."""

    function: Callable[..., Any]
    output: Tensor
    version: int
    statistics: Sequence[Tensor] = ()


Tape = list[Product]


@contextmanager
def recorded(*, others: bool = False) -> Iterator[Tape]:
    """A block whose products are put on a tape, in order; with `others` also what is between them.

    Examples:
        >>> with recorded() as tape:
        ...     _ = F.linear(torch.ones(2, 3), torch.ones(4, 3)).relu()
        >>> tape[0].output.shape
        torch.Size([2, 4])
    """
    tape: Tape = []
    with _Recorder(tape, _PRODUCTS | _OTHERS if others else _PRODUCTS):
        yield tape


@contextmanager
def replayed(tape: Sequence[Product]) -> Iterator[None]:
    """A block of dual numbers that runs the recorded code on the same values: only tangents are computed.

    Before the first dual number nothing is, as far as the tape has the `others`. Where the code takes another way than
    on the tape, all is computed.

    Examples:
        >>> x, w, tangent = torch.ones(2, 3), torch.ones(4, 3), torch.full((4, 3), 0.5)
        >>> with recorded() as tape:
        ...     _ = F.linear(x, w)
        >>> with forward_ad.dual_level(), replayed(tape):
        ...     y = forward_ad.unpack_dual(F.linear(x, forward_ad.make_dual(w, tangent)))
        >>> y.primal[0, 0], y.tangent[0, 0]
        (tensor(3.), tensor(1.5000))
    """
    with _Player(tape):
        yield


def are_duals_of(params: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether these are dual numbers without a graph whose values are the others themselves, and no copies of them."""
    duals = {name: forward_ad.unpack_dual(p) for name, p in params.items()}
    return (
        any(dual.tangent is not None for dual in duals.values())
        and not any(p.requires_grad for p in params.values())
        and all(dual.primal.data_ptr() == others[name].data_ptr() for name, dual in duals.items())
    )


class _Recorder(TorchFunctionMode):
    def __init__(self, tape: Tape, kept: set[Callable[..., Any]]) -> None:
        super().__init__()
        self._tape, self._kept = tape, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self._kept and not _checkpointed():
            if not isinstance(output, Tensor) or any(output is t for t in tensors((args, kwargs))):
                self._tape.append(Product(func, torch.empty(0), -1))  # to be called again: it returned more, or wrote
                return output
            statistics = [t.detach().clone() for t in _statistics(func, args)]
            self._tape.append(Product(func, output.detach(), output._version, statistics))
        return output


class _Player(TorchFunctionMode):
    def __init__(self, tape: Sequence[Product]) -> None:
        super().__init__()
        self._rest: Iterator[Product] = (one for one in tape if one.function in _PRODUCTS)
        self._before_first_dual: Iterator[Product] = (one for one in tape if one.function in _OTHERS)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OTHERS and not _checkpointed():
            return self._other(func, args, kwargs)
        if func not in _PRODUCTS or _checkpointed():
            return func(*args, **kwargs)
        found = next(self._rest, None)
        if found is None or found.function is not func:
            self._rest = iter(())
            return func(*args, **kwargs)
        if found.output._version != found.version:  # written to since, as by relu(inplace=True)
            return func(*args, **kwargs)
        tangent = _tangent(found.output, func, *args, **kwargs)
        if tangent is None:
            return found.output
        if tangent.shape != found.output.shape or tangent.dtype != found.output.dtype:
            self._rest = iter(())
            return func(*args, **kwargs)
        return forward_ad.make_dual(found.output, tangent)

    def _other(self, func: Any, args: Any, kwargs: Any) -> Any:
        moved = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors((args, kwargs)))
        found = None if moved else next(self._before_first_dual, None)
        if found is None or found.function is not func:
            self._before_first_dual = iter(())
            return func(*args, **kwargs)
        if found.output._version != found.version:
            return func(*args, **kwargs)
        for t, value in zip(_statistics(func, args), found.statistics, strict=True):
            t.copy_(value)
        return found.output


def _tangent(
    output: Tensor,
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor | None:
    """That of a product: func(input', weight) + func(input, weight') + bias'; None where nothing moves."""
    x, x_moved = forward_ad.unpack_dual(input)
    w, w_moved = forward_ad.unpack_dual(weight)
    b_moved = None if bias is None else forward_ad.unpack_dual(bias).tangent
    parts = [] if x_moved is None else [func(x_moved, w, None, *rest, **options)]
    parts += [] if w_moved is None else [func(x, w_moved, None, *rest, **options)]
    parts += [] if b_moved is None else [b_moved.view([-1] + [1] * (weight.ndim - 2))]
    if not parts:
        return None
    bias_alone = x_moved is None and w_moved is None
    total: Tensor = parts[0].expand_as(output).to(output.dtype, copy=True) if bias_alone else parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total


def _statistics(func: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Those of a batch normalisation, which it writes to: its second and third argument."""
    return tensors(args[1:3]) if func is F.batch_norm else []


def _checkpointed() -> bool:
    """Whether activations are recomputed here rather than kept."""
    return _top_hooks is None or _top_hooks(True) is not None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
