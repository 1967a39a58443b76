"""Findings about a student's layers."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from metakd._virtual.functional import unwrap
from metakd._virtual.kernels import compiled_parts
from metakd.validation.finding import HANDLED, Finding, Subject, places
from metakd.validation.processes import world_size


def wrappers(subject: Subject) -> Iterator[Finding]:
    """torch.compile and data parallelism around the student."""
    if subject.student is not unwrap(subject.student):
        yield Finding(
            "note",
            f"the student ({type(subject.student).__name__})",
            "virtual steps run the module inside the wrapper: they neither communicate nor run compiled code",
            HANDLED,
        )


def compiled(subject: Subject) -> Iterator[Finding]:
    """torch.compile inside the student, and its random numbers."""
    parts = set(compiled_parts(unwrap(subject.student)))
    if found := [(name, module) for name, module in subject.modules if name in parts]:
        problem = "compiled code has no second derivatives, so virtual steps run it as written"
        if hasattr(torch.compiler, "set_stance"):
            yield Finding("note", places(found), problem, HANDLED)
        else:
            cure = "Use torch 2.6 or later, or compile the student as a whole"
            yield Finding("error", places(found), f"{problem}, which this version of torch cannot do", cure)
    random = [(name, m) for name, m in subject.training(_DropoutNd) if m.p]
    inductor = sys.modules.get("torch._inductor.config")
    if compiled_parts(subject.student) and random and not getattr(inductor, "fallback_random", False):
        yield Finding(
            "warning",
            places(random),
            "code compiled by inductor drops other units than the virtual step on the same batch, so the hypergradient "
            "is exact for neither",
            "Set torch._inductor.config.fallback_random = True before the first step",
        )


def attention(subject: Subject) -> Iterator[Finding]:
    """Fused attention."""
    if found := subject.layers(nn.MultiheadAttention):
        yield Finding(
            "note",
            places(found),
            "fused attention has neither forward mode nor second derivatives, so virtual steps run the math kernel, "
            "which holds batch x heads x length x length numbers per layer",
            "If memory runs out, use smaller batches or shorter sequences",
        )


def recurrent(subject: Subject) -> Iterator[Finding]:
    """Recurrent kernels of oneDNN, cuDNN and CUDA."""
    if found := subject.layers(nn.RNNBase):
        yield Finding(
            "note",
            places(found),
            "oneDNN's and cuDNN's recurrent kernels have neither forward mode nor second derivatives, so virtual steps "
            "run torch's own kernels",
            HANDLED,
        )
    gated = subject.layers(nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
    if found := _on_cuda(gated):
        forward = subject.needs_forward_mode
        yield Finding(
            "error" if forward else "warning",
            places(found),
            "on CUDA torch's own kernels have second derivatives, but no forward mode",
            "Use reverse mode, which mode='auto' falls back to: as exact, with more time and memory",
            forward_mode=False,
        )
    layered = [(name, m) for name, m in subject.training(nn.RNNBase) if m.dropout and m.num_layers != 1]
    if torch.backends.cudnn.enabled and (found := _on_cuda(layered)):
        yield Finding(
            "error",
            places(found),
            "on CUDA cuDNN's dropout between layers draws other numbers than torch's own kernels, which virtual steps "
            "run, so the losses would differ",
            "Use dropout=0 and nn.Dropout between recurrent layers of one layer each, or train with "
            "torch.backends.cudnn.enabled = False",
        )


def _on_cuda(layers: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in layers if any(p.is_cuda for p in m.parameters())]


def weight_norm(subject: Subject) -> Iterator[Finding]:
    """Weight norm, by parametrization or by the older hook."""
    if found := _reparametrised(subject, "WeightNorm"):
        yield Finding(
            "note",
            places(found),
            "torch's fused weight norm has no forward mode, and its second derivative is wrong, so virtual steps "
            "compute it by its formula",
            HANDLED,
        )


def spectral_norm(subject: Subject) -> Iterator[Finding]:
    """Spectral norm in train mode, by parametrization or by the older hook."""
    found = [(name, m) for name, m in _reparametrised(subject, "SpectralNorm") if m.training and _learns(m)]
    if found:
        yield Finding(
            "warning",
            places(found),
            "in train mode every gradient of spectral norm treats the singular vectors of its power iteration as "
            "constants, and so does the hypergradient: check_hypergradient reports the difference",
            "Nothing to do in training; in eval mode it is exact",
        )


def _reparametrised(subject: Subject, kind: str) -> list[tuple[str, nn.Module]]:
    def parts(module: nn.Module) -> list[Any]:
        chains: Any = module.parametrizations if is_parametrized(module) else {}
        return [*module._forward_pre_hooks.values(), *(part for chain in chains.values() for part in chain)]

    return [(name, m) for name, m in subject.modules if any(type(p).__name__.endswith(kind) for p in parts(m))]


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def batch_norm(subject: Subject) -> Iterator[Finding]:
    """Batches of one; statistics shared between processes."""
    if found := subject.training(_BatchNorm):
        yield Finding(
            "note",
            places(found),
            "in train mode it raises on a batch with a single value per channel",
            "If the last batch may have size 1, use DataLoader(drop_last=True)",
        )
    several = world_size() > 1
    if (found := subject.training(nn.SyncBatchNorm)) and subject.differentiates_twice:
        yield Finding(
            "error" if several else "note",
            places(found),
            "in several processes its kernels have neither forward mode nor second derivatives",
            "There, use BatchNorm or estimators.FiniteDifference()",
            forward_mode=not several,
        )


def twice_differentiable(subject: Subject) -> Iterator[Finding]:
    """Layers without second derivatives."""
    found = [(name, m) for name, m in subject.layers(nn.EmbeddingBag) if _learns(m)]
    found += subject.layers(nn.CrossMapLRN2d)
    if found and subject.differentiates_twice:
        yield Finding(
            "error",
            places(found),
            "torch has neither forward mode nor second derivatives for it",
            "Use estimators.FiniteDifference(), or other layers (nn.Embedding and a mean; nn.LocalResponseNorm)",
            forward_mode=False,
        )


def embeddings(subject: Subject) -> Iterator[Finding]:
    """Flags of embeddings."""
    tables = subject.layers(nn.Embedding, nn.EmbeddingBag)
    for flag, problem, value in (
        ("max_norm", "the forward pass rewrites the weight, so virtual steps would change the student", None),
        ("scale_grad_by_freq", "the gradient is not the loss's derivative, so no hypergradient is exact", False),
    ):
        if found := [(name, m) for name, m in tables if getattr(m, flag)]:
            yield Finding("error", places(found), f"with {flag} {problem}", f"Use {flag}={value}")
    if found := [(name, m) for name, m in tables if m.sparse]:
        yield Finding("note", places(found), "in virtual steps its gradient is dense, as large as the table", HANDLED)


def checkpointing(subject: Subject) -> Iterator[Finding]:
    """Re-entrant activation checkpointing, by torch's wrapper or in Hugging Face's style."""
    if found := [(name, m) for name, m in subject.training(nn.Module) if _reenters(vars(m))]:
        yield Finding(
            "error",
            places(found),
            "activation checkpointing with re-entry does not work with torch.autograd.grad",
            "Use checkpointing with use_reentrant=False",
        )


def _reenters(attributes: dict[str, Any]) -> bool:
    if getattr(attributes.get("checkpoint_impl"), "name", None) == "REENTRANT":
        return True
    function = attributes.get("_gradient_checkpointing_func") if attributes.get("gradient_checkpointing") else None
    return function is not None and bool(getattr(function, "keywords", {}).get("use_reentrant", True))
