"""How terms read the student's outputs, the labels and the teacher's outputs, and check them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakd._basics.checks import check, checked_before, once
from metakd._basics.sizes import is_integer
from metakd.batch import Batch
from metakd.errors import MetaKDError


def logits(outputs: Any) -> Tensor:
    """Return the logits of a model's output.

    Args:
        outputs: a tensor, or an object with a `logits` attribute (the Hugging Face convention).

    Returns:
        The logits, shape `(B, C)`. Half precision is raised to float32, because losses need the digits.

    Raises:
        MetaKDError: there is no floating tensor of two dimensions.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from metakd.terms import logits
        >>> logits(SimpleNamespace(logits=torch.zeros(2, 3))).shape
        torch.Size([2, 3])
    """
    found = tensor_in(outputs)
    if found is None or found.ndim != 2 or not (dtype := found.dtype).is_floating_point:
        raise MetaKDError(
            f"expected logits of shape (B, C), as a floating tensor or as an object's .logits, got "
            f"{describe(outputs)}; let the model return them, or write a term of your own{_instead(found)}"
        )
    return found.float() if dtype in (torch.float16, torch.bfloat16) else found


def class_logits(outputs: Any) -> Tensor:
    """Return the logits `(B, C)` of at least two classes, or raise."""
    found = logits(outputs)
    if found.shape[1] < 2:
        raise MetaKDError(
            f"the student has {found.shape[1]} output, but cross-entropy and divergences need logits of at least two "
            "classes: the softmax of a single logit is always 1. Write a term of your own: for regression "
            f"{_REGRESSION}; for binary labels {_BINARY}. Or add a logit for the other class: "
            "torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    return found


def class_indices(student: Tensor, batch: Batch) -> Tensor:
    """Return `batch.targets` as int64 class indices `(B,)` in the range of the `(B, C)` logits, or raise."""
    targets = batch.targets
    if targets is None:
        raise MetaKDError(
            "the targets are missing: batch.targets is None; pass the loader's labels as Batch(targets=...)"
        )
    if not isinstance(targets, Tensor):
        raise MetaKDError(
            f"batch.targets must be a tensor of {student.shape[0]} class indices, got {type(targets).__name__}; "
            "convert it with torch.as_tensor"
        )
    found: Tensor = once(targets, ("labels", student.shape, student.device), lambda: _indices(student, targets))
    return found


def _indices(student: Tensor, targets: Tensor) -> Tensor:
    size, classes = student.shape
    if targets.shape != (size,) or not is_integer(targets):
        raise MetaKDError(
            f"batch.targets must hold integer class indices of shape ({size},), one for each row of the "
            f"logits {tuple(student.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}; for "
            "one-hot or soft labels use targets.argmax(dim=1) or a term of your own; for regression or several labels "
            "per sample use a term such as "
            "lambda outputs, batch: F.mse_loss(outputs, batch.targets, reduction='none').mean(dim=1)"
        )
    _check_device(targets, student, "batch.targets is")
    return check_range(
        targets,
        classes,
        "label",
        f"the student has {classes} outputs: give it one per class, or correct the labels (no label means "
        "'ignore': drop such samples)",
    ).long()


def teacher_logits(student: Tensor, batch: Batch) -> Tensor:
    """Return the teacher's detached `(B, C)` logits in the student's dtype, or raise."""
    teacher = the_teachers_logits(batch)
    if teacher.shape != student.shape:
        raise MetaKDError(
            f"the teacher's outputs have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}; "
            "both must score the same classes of the same samples: run the teacher on this batch, and give "
            "both networks the same classes"
        )
    _check_device(teacher, student, "the teacher's outputs are")
    return teacher.to(student.dtype)


def the_teachers_logits(batch: Batch) -> Tensor:
    """Return the detached logits of a single teacher, with any number of classes, or raise."""
    if isinstance(batch.teacher, tuple | list):
        raise MetaKDError(
            f"batch.teacher is a {type(batch.teacher).__name__} of {len(batch.teacher)} outputs (an ensemble of "
            "teachers), but this needs the logits of one teacher; pick one by terms.FromTeacher(term, 0), or in a "
            "function of your own by batch._replace(teacher=batch.teacher[0]), or average them by "
            "teacher=torch.stack(batch.teacher).mean(dim=0)"
        )
    return _of_one_teacher(batch.teacher)


def every_teachers_logits(batch: Batch) -> list[Tensor]:
    """Return the detached logits of each teacher, with any number of classes, or raise."""
    return [_of_one_teacher(one) for one in every_teachers_outputs(batch)]


def every_teachers_outputs(batch: Batch) -> list[Any]:
    """The outputs of each teacher as they are; of a single one, a list of one."""
    return list(batch.teacher) if isinstance(batch.teacher, tuple | list) else [batch.teacher]


def _of_one_teacher(outputs: Any) -> Tensor:
    if outputs is None:
        raise MetaKDError(
            "the teacher's outputs are missing: batch.teacher is None; pass the teacher as "
            "BilevelLossBalancer(..., teacher=...) or its outputs for this batch as Batch(teacher=...)"
        )
    check_not_stacked(outputs)
    return logits(outputs).detach()


def check_not_stacked(outputs: Any) -> None:
    """Raise if a teacher's outputs look like those of several teachers in one tensor."""
    found = tensor_in(outputs)
    if found is not None and found.ndim == 3:
        raise MetaKDError(
            f"the teacher's outputs are one tensor of shape {tuple(found.shape)}; if these are several teachers, give "
            "a list of their outputs (B, C): Batch(teacher=list(stacked.unbind(1))) for the shape (B, teachers, C), "
            "unbind(0) for (teachers, B, C)"
        )


def check_range(indices: Tensor, size: int, what: str, cure: str) -> Tensor:
    """Raise if an index is outside `[0, size)`, now or when the call's checks are read; return the indices.

    Off the CPU, where an index out of range would end the process before that, they are clamped. The check reads the
    values. It is skipped where that is impossible: under `torch.compile` and on the meta device.
    """
    if indices.is_meta or indices.numel() == 0 or torch.compiler.is_compiling():
        return indices

    def judge(low: float, high: float) -> None:
        if low < 0 or high >= size:
            raise MetaKDError(f"{what} {int(low if low < 0 else high)} is out of range [0, {size}); {cure}")

    if not checked_before(indices, size):
        check(judge, *torch.aminmax(indices))
    return indices if indices.device.type == "cpu" else indices.clamp(0, size - 1)


def tensor_in(value: Any) -> Tensor | None:
    """Return the tensor that a value is or has as `.logits`, or None."""
    found = value if isinstance(value, Tensor) else getattr(value, "logits", None)
    return found if isinstance(found, Tensor) else None


def describe(value: Any) -> str:
    """Describe a value by type, shape and dtype."""
    found = tensor_in(value)
    if found is None:
        return type(value).__name__
    kind = "a tensor" if found is value else f"{type(value).__name__} with .logits"
    return f"{kind} of shape {tuple(found.shape)} and {found.dtype}"


_REGRESSION = (
    "lambda outputs, batch: F.mse_loss(outputs.flatten(), batch.targets.flatten().to(outputs), reduction='none')"
)
_BINARY = (
    "lambda outputs, batch: F.binary_cross_entropy_with_logits(outputs.flatten(), "
    "batch.targets.flatten().to(outputs), reduction='none')"
)


def _instead(found: Tensor | None) -> str:
    """The term to write instead for such outputs."""
    if found is None:
        return " that selects them: lambda outputs, batch: CrossEntropy()(outputs[0], batch)"
    if found.is_complex():
        return " that takes their .abs() or .real: lambda outputs, batch: CrossEntropy()(outputs.abs(), batch)"
    if found.ndim < 2:
        return f"; for regression of one number per sample, {_REGRESSION}; for a single binary logit, {_BINARY}"
    return (
        "; for one class per pixel, lambda outputs, batch: F.cross_entropy(outputs, batch.targets, "
        "reduction='none').flatten(1).mean(dim=1)"
    )


def _check_device(found: Tensor, student: Tensor, what: str) -> None:
    if found.device != student.device:
        raise MetaKDError(
            f"{what} on {found.device}, the student's outputs on {student.device}; move both to one device"
        )
