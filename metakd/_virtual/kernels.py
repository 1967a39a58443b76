"""Differentiable replacements for operations whose fast kernels lack derivatives or have wrong ones."""

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

from metakd._basics.replaced import replaced
from metakd._virtual.batch_norm import batch_norm
from metakd._virtual.precision import autocasts_to_float16
from metakd.errors import MetaKDError


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """A block whose operations have forward-mode derivatives and correct second derivatives.

    Attention uses its math kernel, recurrent layers torch's own kernels, compiled parts their Python code, and the
    functions in `_SAME_FUNCTION` formulas. Autocast to float16 is off. Operations without a replacement stay (see
    `metakd.validate`).

    Raises:
        MetaKDError: an embedding's gradient is not the derivative of its loss, or torch before 2.6 cannot run compiled
            parts as Python code.
    """
    kind = next((p.device.type for p in module.parameters()), "cpu")
    fastpath, autocast = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_enabled(kind)
    with sdpa_kernel(SDPBackend.MATH), uncompiled(module), replaced(_SAME_FUNCTION, partial(_keep_float16_off, kind)):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_enabled(kind, autocast)


def compiled_parts(module: nn.Module) -> list[str]:
    """Names of the submodules that `torch.compile(part)` or `part.compile()` compiled."""
    return [name for name, m in module.named_modules() if is_compiled(m)]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module itself is compiled, by `torch.compile(module)` or `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> AbstractContextManager[None]:
    """A block that runs compiled parts as Python code.

    Compiled code has no second derivatives, and silently drops tangents.

    Raises:
        MetaKDError: a part is compiled, and torch is older than 2.6.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    if parts := compiled_parts(module):
        raise MetaKDError(
            f"parts of the student are compiled ({parts[:5]}), and torch {torch.__version__} cannot run their Python "
            "code in virtual steps; use torch 2.6 or later, or compile the whole student: torch.compile(student)"
        )
    return nullcontext()


@contextmanager
def recomputed_by(run: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """A block whose activation checkpoints are later recomputed inside `run`.

    Recomputation happens in the backward pass, when the module has its own parameters again.
    """
    hook, thread = checkpointing._checkpoint_hook, get_ident()

    def replaying(frame: Any) -> Any:
        if get_ident() != thread:  # all threads share torch's hook; another one may be training
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
    """A block with an empty `parametrize.cached()`, whose entries come from the real parameters."""
    kept, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = kept


def _keep_float16_off(kind: str) -> None:
    """The student may have opened such a block, whose end restores the setting."""
    if torch.is_autocast_enabled(kind) and autocasts_to_float16(kind):
        torch.set_autocast_enabled(kind, False)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The fused kernel has no forward mode, and its double backward treats the norm as a constant."""
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
    """An embedding with dense gradients: sparse ones cannot be tangents of dual numbers, nor be measured."""

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
    "scale_grad_by_freq": "makes its gradient differ from the loss's derivative, so that no hypergradient is "
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
