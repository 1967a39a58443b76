"""Tangents of common operations, with fewer kernels than torch takes.

Where an argument has no tangent, torch makes one of zeros and applies the general formula: three to five kernels, and
half a millisecond of Python on a CPU, for what takes two kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


class _Argument(NamedTuple):
    value: Any
    tangent: Tensor | None


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """`forward_ad.make_dual` without its checks, which take longer than a small tensor's kernel."""
    dual: Tensor = torch._make_dual(value, tangent, level=forward_ad._current_level)
    return dual


def with_formula(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of an operation with a formula here; torch's own if it does not apply."""
    found = dual_formula(func, args, kwargs)
    return func(*args, **kwargs) if found is None else found


def dual_formula(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The dual result of an operation with a formula here; None without dual arguments, or where it does not apply.

    Examples:
        >>> with forward_ad.dual_level():
        ...     x = forward_ad.make_dual(torch.tensor([1.0]), torch.tensor([5.0]))
        ...     tuple(forward_ad.unpack_dual(dual_formula(torch.sub, (3, x), {})))
        (tensor([2.]), tensor([-5.]))
    """
    if not torch._C._is_fwd_grad_enabled():
        return None
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors or not all(map(_plain, tensors)) or torch.is_autocast_enabled(tensors[0].device.type):
        return None
    pairs = {id(x): _Argument(*torch._unpack_dual(x, level=forward_ad._current_level)) for x in tensors}
    if all(pair.tangent is None for pair in pairs.values()):
        return None
    found = FORMULAS[func](
        func, *(pairs.get(id(x), x) for x in args), **{name: pairs.get(id(x), x) for name, x in kwargs.items()}
    )
    return None if found is None else make_dual(*found)


def _plain(value: Tensor) -> bool:
    """Whether a tensor is dense, real, and not followed by autograd."""
    return type(value) is Tensor and value.layout == torch.strided and not (value.requires_grad or value.is_complex())


def _apart(value: Any) -> _Argument:
    return value if isinstance(value, _Argument) else _Argument(value, None)


def _product(func: Callable[..., Any], left: Any, right: Any, **options: Any) -> tuple[Tensor, Tensor] | None:
    """A product or quotient with a constant."""
    (x, moved), (y, also) = _apart(left), _apart(right)
    if options:
        return None
    if moved is not None and also is None:
        return func(x, y), func(moved, y)
    if moved is None and also is not None and func not in _QUOTIENTS:
        return func(x, y), func(x, also)
    return None


def _sum(signs: tuple[int, int]) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """A sum or difference with a constant; `signs` are those of the arguments."""

    def formula(func: Callable[..., Any], left: Any, right: Any, **options: Any) -> tuple[Tensor, Tensor] | None:
        pair = _apart(left), _apart(right)
        moving = [(one.tangent, sign) for one, sign in zip(pair, signs, strict=True) if one.tangent is not None]
        if options or len(moving) != 1:
            return None
        value, (tangent, sign) = func(pair[0].value, pair[1].value), moving[0]
        # A new tensor, as later operations may write to the result and its tangent.
        new = torch.mul(tangent, sign).to(value.dtype)
        return value, new if new.shape == value.shape else new.expand_as(value).clone()

    return formula


def _linear(func: Callable[..., Any], input: Any, weight: Any, bias: Any = None) -> tuple[Tensor, Tensor] | None:
    """W x + b has the tangent W' x + b' + W x'."""
    (x, dx), (w, dw), (b, db) = _apart(input), _apart(weight), _apart(bias)
    value = F.linear(x, w, b)
    if dw is None:
        return None if db is not None or dx is None else (value, F.linear(dx, w))
    tangent = F.linear(x, dw, db)
    if dx is not None:
        tangent = tangent.addmm_(dx, w.t()) if x.ndim == 2 else tangent.add_(F.linear(dx, w))
    return value, tangent


def _log_softmax(
    func: Callable[..., Any], input: Any, dim: Any = None, *dtype: Any, **options: Any
) -> tuple[Tensor, Tensor] | None:
    """Log p = log softmax(z) has the tangent z' - <p, z'>."""
    if dim is None or dtype or options.get("dtype") is not None:
        return None
    z, moved = input
    assert moved is not None  # the only tensor
    value = torch.log_softmax(z, dim)
    return value, moved - (value.exp() * moved).sum(dim, keepdim=True)


_QUOTIENTS = {torch.div, Tensor.div, torch.true_divide, Tensor.true_divide}
FORMULAS: dict[Any, Callable[..., tuple[Tensor, Tensor] | None]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, *_QUOTIENTS), _product),
    **dict.fromkeys((torch.add, Tensor.add), _sum((1, 1))),
    **dict.fromkeys((torch.sub, Tensor.sub), _sum((1, -1))),
    Tensor.__rsub__: _sum((-1, 1)),
    F.linear: _linear,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
}
