"""The parts that a balancer is given: their checks, and the default weight model."""

import warnings
from typing import Any

import torch
from torch import nn

from metakd.errors import MetaKDError
from metakd.estimators import Estimator
from metakd.student import FunctionalStudent
from metakd.validation import validate
from metakd.weighting import LossMLP


def check_parts(student: nn.Module, optimizer: torch.optim.Optimizer, estimator: Estimator) -> None:
    """Raise a `MetaKDError` where a part is not what it should be.

    Examples:
        >>> from metakd.estimators import OneStep
        >>> student = nn.Linear(1, 1)
        >>> check_parts(student, torch.optim.SGD(student.parameters()), OneStep)
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: estimator must be an object such as estimators.OneStep(), got <class ...>
    """
    if not isinstance(student, nn.Module):
        raise MetaKDError(f"student must be an nn.Module with a trainable parameter, got {type(student).__name__}")
    if not any(p.requires_grad for p in student.parameters()):
        raise MetaKDError("the student has no trainable parameter; call requires_grad_(True) on those to train")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaKDError(
            f"optimizer must be the student's torch optimizer, got {type(optimizer).__name__}; pass the one whose "
            "step() trains the student, such as torch.optim.SGD(student.parameters(), lr=0.1)"
        )
    if isinstance(estimator, str | type) or not callable(estimator):
        raise MetaKDError(f"estimator must be an object such as estimators.OneStep(), got {estimator!r}")


def validated(student: nn.Module, optimizer: torch.optim.Optimizer, estimator: Estimator) -> dict[str, Any]:
    """What estimators should know about the student from the start; the findings of `validate` are said here, once.

    Raises:
        MetaKDError: a finding is an error.

    Examples:
        >>> from metakd.estimators import OneStep
        >>> student = nn.Linear(1, 1)
        >>> validated(student, torch.optim.SGD(student.parameters()), OneStep())
        {}
    """
    findings = validate(student, optimizer, estimator)
    if errors := [str(finding) for finding in findings if finding.level == "error"]:
        raise MetaKDError("\n".join(errors))
    if said := [str(finding) for finding in findings if finding.level == "warning"]:
        warnings.warn("\n".join(said), stacklevel=3)
    return {} if all(finding.forward_mode for finding in findings) else {"forward_mode": False}


def default_weighting(student: FunctionalStudent, width: int | None, terms: int) -> LossMLP:
    """BiKD's weight model where the student is, in float32 or finer; drawn without a trace on the random numbers.

    Examples:
        >>> default_weighting(FunctionalStudent(nn.Linear(1, 1)), width=2, terms=3).terms
        3
    """
    like = next(iter(student.trainable().values()))
    with student.untouched():
        return LossMLP(width, terms).to(like.device, torch.promote_types(like.dtype, torch.float32))
