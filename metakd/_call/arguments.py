"""The parts that a balancer is given: their checks, and the default weight model."""

import warnings
from typing import Any

import torch
from torch import nn

from metakd._virtual.functional import FunctionalStudent
from metakd._virtual.teacher import members
from metakd.errors import MetaKDError
from metakd.estimators import Estimator
from metakd.estimators.estimate import checked_estimator
from metakd.estimators.memory import Memory
from metakd.inner.groups import Optimizers, optimizers
from metakd.validation import validate
from metakd.weighting import LossMLP


def check_parts(student: nn.Module, optimizer: Optimizers, estimator: Estimator) -> None:
    """Raise a `MetaKDError` where a part is not what it should be.

    Examples:
        >>> from metakd.estimators import OneStep
        >>> student = nn.Linear(1, 1)
        >>> check_parts(student, torch.optim.SGD(student.parameters()), OneStep)
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: estimator is the class OneStep; give an object of it, OneStep()
    """
    if not isinstance(student, nn.Module):
        raise MetaKDError(f"student must be an nn.Module with a trainable parameter, got {type(student).__name__}")
    if not any(p.requires_grad for p in student.parameters()):
        raise MetaKDError("the student has no trainable parameter; call requires_grad_(True) on those to train")
    optimizers(optimizer)
    checked_estimator(estimator)


def validated(student: nn.Module, optimizer: Optimizers, estimator: Estimator) -> Memory:
    """What estimators should know about the student from the start; the findings of `validate` are said here, once.

    Raises:
        MetaKDError: a finding is an error.

    Examples:
        >>> from metakd.estimators import OneStep
        >>> student = nn.Linear(1, 1)
        >>> validated(student, torch.optim.SGD(student.parameters()), OneStep()).forward_mode is None
        True
    """
    findings = validate(student, optimizer, estimator)
    if errors := [str(finding) for finding in findings if finding.level == "error"]:
        raise MetaKDError("\n".join(errors))
    if said := [str(finding) for finding in findings if finding.level == "warning"]:
        warnings.warn("\n".join(said), stacklevel=3)
    return Memory(forward_mode=None if all(finding.forward_mode for finding in findings) else False)


def check_teacher(teacher: Any) -> None:
    """Raise a `MetaKDError` where the teacher is neither None nor one that can be called, nor a sequence of such.

    Examples:
        >>> check_teacher(nn.Linear(1, 1)); check_teacher([torch.relu, nn.Linear(1, 1)])
        >>> check_teacher([nn.Linear(1, 1), "resnet56"])
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: teacher[1] is of type str; a teacher is an nn.Module or any other callable ...
    """
    if teacher is None:
        return
    ensemble = members(teacher)
    if ensemble is None:
        _check_one_teacher(teacher, "teacher")
    elif not ensemble:
        raise MetaKDError(f"teacher is an empty {type(teacher).__name__}, {_TEACHERS}")
    for position, one in enumerate(ensemble or []):
        _check_one_teacher(one, f"teacher[{position}]")


def _check_one_teacher(teacher: Any, what: str) -> None:
    if isinstance(teacher, type):
        raise MetaKDError(f"{what} is the class {teacher.__name__}, not an object of it; write {teacher.__name__}(...)")
    if any(cls.__name__ == "ExportedProgram" and cls.__module__.startswith("torch.") for cls in type(teacher).__mro__):
        raise MetaKDError(
            f"{what} is an ExportedProgram, which cannot be called; pass its module, teacher=program.module(), "
            "exported in eval mode and for any batch size"
        )
    unfinished = isinstance(teacher, nn.Module) and getattr(teacher.forward, "__func__", None) is nn.Module.forward
    if unfinished or not callable(teacher):
        raise MetaKDError(f"{what} is of type {type(teacher).__name__}; {_TEACHERS}")


_TEACHERS = (
    "a teacher is an nn.Module or any other callable that takes the student's inputs, or a sequence of these: an "
    "ensemble"
)


def weighting_dtype(like: torch.Tensor) -> torch.dtype:
    """The real floating-point type, float32 or finer, of a weight model beside a parameter of the student.

    Examples:
        >>> weighting_dtype(torch.zeros(1, dtype=torch.complex128)), weighting_dtype(torch.zeros(1).half())
        (torch.float64, torch.float32)
    """
    return torch.promote_types(like.dtype.to_real(), torch.float32)


def default_weighting(student: FunctionalStudent, width: int | None, terms: int) -> LossMLP:
    """BiKD's weight model where the student is, in `weighting_dtype`; drawn without a trace on the random numbers.

    Examples:
        >>> default_weighting(FunctionalStudent(nn.Linear(1, 1)), width=2, terms=3).terms
        3
    """
    like = next(iter(student.trainable().values()))
    with student.untouched():
        return LossMLP(width, terms).to(like.device, weighting_dtype(like))
