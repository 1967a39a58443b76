"""How a term reads the student's outputs, the labels and the teacher's outputs, and what it checks first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError


def logits(outputs: Any) -> Tensor:
    """Return the `(B, C)` logits in a model's output.

    Args:
        outputs: a tensor, or an object with a `logits` attribute (the Hugging Face convention).

    Returns:
        The logits, shape `(B, C)`. Half precision is raised to float32, since losses need its digits.

    Raises:
        MetaKDError: there is no floating tensor of two dimensions to be found.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from metakd.terms import logits
        >>> logits(SimpleNamespace(logits=torch.zeros(2, 3))).shape
        torch.Size([2, 3])
    """
    found = tensor_in(outputs)
    if found is None or found.ndim != 2 or not found.is_floating_point():
        raise MetaKDError(
            f"expected logits of shape (B, C), as a floating tensor or as an object's .logits, got "
            f"{describe(outputs)}; make the model return them, or write a term of your own that picks them "
            "out: lambda outputs, batch: CrossEntropy()(outputs[0], batch)"
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def class_indices(student: Tensor, batch: Batch) -> Tensor:
    """Return `batch.targets` as int64 class indices `(B,)` that fit the `(B, C)` logits, or raise."""
    size, classes = student.shape
    targets = batch.targets
    if targets is None:
        raise MetaKDError(
            "the targets are missing: batch.targets is None; give the loader's labels as Batch(targets=...)"
        )
    if not isinstance(targets, Tensor):
        raise MetaKDError(
            f"batch.targets must be a tensor of {size} class indices, got {type(targets).__name__}; convert "
            "it with torch.as_tensor"
        )
    wrong_dtype = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    if targets.shape != (size,) or wrong_dtype:
        raise MetaKDError(
            f"batch.targets must hold integer class indices of shape ({size},), one for each row of the "
            f"logits {tuple(student.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}; for "
            "one-hot or soft labels use targets.argmax(dim=1) or a term of your own"
        )
    _check_device(targets, student, "batch.targets is")
    check_range(
        targets,
        classes,
        "label",
        f"the student has {classes} outputs: give it one a class, or mend the labels (there is no code for "
        "'ignore': drop such samples)",
    )
    return targets.long()


def teacher_logits(student: Tensor, batch: Batch) -> Tensor:
    """Return the teacher's detached `(B, C)` logits in the student's dtype, or raise."""
    if batch.teacher is None:
        raise MetaKDError(
            "the teacher's outputs are missing: batch.teacher is None; pass the teacher as "
            "BilevelLossBalancer(..., teacher=...) or its outputs for this batch as Batch(teacher=...)"
        )
    teacher = logits(batch.teacher).detach()
    if teacher.shape != student.shape:
        raise MetaKDError(
            f"the teacher's outputs have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}; "
            "both must score the same classes of the same samples: run the teacher on this batch and give "
            "both the same head"
        )
    _check_device(teacher, student, "the teacher's outputs are")
    return teacher.to(student.dtype)


def check_range(indices: Tensor, size: int, what: str, cure: str) -> None:
    """Raise where an index is outside `[0, size)`.

    That takes a look at the values, so it is skipped where none can be taken: while a CUDA graph is captured,
    under `torch.compile`, on the meta device.
    """
    capturing = indices.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or indices.is_meta or indices.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = torch.stack(torch.aminmax(indices)).tolist()
    if low < 0 or high >= size:
        raise MetaKDError(f"{what} {low if low < 0 else high} is out of range [0, {size}); {cure}")


def tensor_in(value: Any) -> Tensor | None:
    """Return the tensor that a value is or carries as `.logits`, or None."""
    found = value if isinstance(value, Tensor) else getattr(value, "logits", None)
    return found if isinstance(found, Tensor) else None


def describe(value: Any) -> str:
    """Say in a few words what a value is: type, shape and dtype."""
    found = tensor_in(value)
    if found is None:
        return type(value).__name__
    kind = "a tensor" if found is value else f"{type(value).__name__} with .logits"
    return f"{kind} of shape {tuple(found.shape)} and {found.dtype}"


def _check_device(found: Tensor, student: Tensor, what: str) -> None:
    if found.device != student.device:
        raise MetaKDError(
            f"{what} on {found.device}, the student's outputs on {student.device}; move both to one device"
        )
