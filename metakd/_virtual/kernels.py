"""What virtual passes run in place of code that cannot be differentiated again."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from metakd._virtual.batch_norm import batch_norm
from metakd._virtual.precision import autocasts_to_float16
from metakd.errors import MetaKDError


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """A block whose operations have forward-mode derivatives and correct second derivatives.

    Attention runs its math kernel, recurrent layers torch's own ones, compiled parts run as written, the functions in
    `_SAME_FUNCTION` as formulas, and code under autocast to float16 as written. What cannot be helped stays what it is
    (`metakd.validate` knows it).

    Raises:
        MetaKDError: an embedding whose gradient is not the derivative of the loss, or compiled parts in the module
            where torch is older than 2.6.

    Examples:
        >>> v, g = torch.ones(1, 4), torch.ones(1, 1)
        >>> with differentiable_kernels(nn.Identity()):
        ...     torch.func.jvp(lambda v: torch._weight_norm(v, g, 0), (v,), (v,))[1]
        tensor([[0., 0., 0., 0.]])
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(uncompiled(module))
        kind = next((p.device.type for p in module.parameters()), "cpu")
        stack.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
        stack.enter_context(_Formulas(kind))
        yield


def compiled_parts(module: nn.Module) -> list[str]:
    """The names of the submodules that `torch.compile(part)` or `part.compile()` compiled.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> model[1].compile(backend="eager")
        >>> compiled_parts(model)
        ['1']
    """
    return [
        name for name, m in module.named_modules() if "_orig_mod" in m._modules or m._compiled_call_impl is not None
    ]


def uncompiled(module: nn.Module) -> AbstractContextManager[None]:
    """A block in which compiled parts run as written.

    Compiled code gives no second derivatives, and drops those of forward mode without a word.

    Raises:
        MetaKDError: there are such parts, and torch is older than 2.6.

    Examples:
        >>> with uncompiled(nn.Identity()):
        ...     pass
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    if parts := compiled_parts(module):
        raise MetaKDError(
            f"parts of the student are compiled ({parts[:5]}), and torch {torch.__version__} cannot run them as "
            "written in virtual steps; use torch 2.6 or later, or compile it as a whole: torch.compile(student)"
        )
    return nullcontext()


@contextmanager
def recomputed_by(run: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """A block whose activation checkpoints are recomputed inside `run`, whenever that will be.

    Recomputing happens in the backward pass, when the module has its own parameters again.
    """
    hook, thread = checkpointing._checkpoint_hook, get_ident()

    def replaying(frame: Any) -> Any:
        if get_ident() != thread:  # torch has one hook for all threads, and another may train meanwhile
            return hook(frame)
        recompute = frame.recompute_fn
        frame.recompute_fn = lambda *args: run(partial(recompute, *args))
        return hook(frame)

    checkpointing._checkpoint_hook = replaying  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpointing._checkpoint_hook = hook  # type: ignore[misc]


@contextmanager
def no_parametrization_cache() -> Iterator[None]:
    """A block in which `parametrize.cached()` of the user's remembers nothing that was computed outside.

    Else a virtual pass would take the parametrized tensors of the real parameters.
    """
    kept, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = kept


class _Formulas(TorchFunctionMode):
    """A block where functions of torch run as others that compute the same, and never under autocast to float16."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if autocasts_to_float16(self._kind):  # a block within the student; its end puts back what was before it
            torch.set_autocast_enabled(self._kind, False)
        return _SAME_FUNCTION.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The fused kernel has no forward mode, and its double backward takes the norm for a constant."""
    if dim == -1:
        norm: Tensor = torch.linalg.vector_norm(v)
    else:
        rows = v.transpose(0, dim).reshape(v.shape[dim], -1)
        norm = torch.linalg.vector_norm(rows, dim=1).view([-1 if d == dim else 1 for d in range(v.dim())])
    return v * (g / norm)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """The kernel has no double backward."""
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _lookup(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sparse gradients cannot be the tangents of dual numbers, nor be measured."""

    def dense(*args: Any, **options: Any) -> Any:
        for flag, why in _NO_DERIVATIVE.items():
            if options.get(flag):
                raise MetaKDError(f"an embedding has {flag}={options[flag]}, which {why}")
        return function(*args, **{**options, "sparse": False})

    return dense


def _recurrent(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """OneDNN's and cuDNN's recurrent kernels have neither forward mode nor double backward."""

    def own(*args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(setattr, backend, "enabled", backend.enabled)
                setattr(backend, "enabled", False)  # noqa: B010
            return kernel(*args, **options)

    return own


_NO_DERIVATIVE = {
    "max_norm": "rewrites its weight in every forward pass, so that virtual steps would change the student; use "
    "max_norm=None and shorten the vectors in forward: x * (max_norm / x.norm(dim=-1, keepdim=True)).clamp(max=1)",
    "scale_grad_by_freq": "makes its gradient another thing than the loss's derivative, so that no hypergradient is "
    "exact; use scale_grad_by_freq=False",
}

_SAME_FUNCTION: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    F.batch_norm: batch_norm,
    F.embedding: _lookup(F.embedding),
    F.embedding_bag: _lookup(F.embedding_bag),
    **{kernel: _recurrent(kernel) for kernel in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
