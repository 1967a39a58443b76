"""Checks of a balancer's arguments, and the default weight model."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from metakd._autodiff import Params
from metakd._virtual.functional import FunctionalStudent
from metakd._virtual.shards import is_sharded
from metakd._virtual.teacher import members
from metakd.errors import MetaKDError
from metakd.estimators import Estimator
from metakd.estimators.estimate import checked_estimator
from metakd.estimators.memory import Memory
from metakd.inner.groups import Optimizers, optimizers
from metakd.validation import validate
from metakd.weighting import LossMLP


def check_parts(student: nn.Module, optimizer: Optimizers, estimator: Estimator) -> None:
    """Check the student, the optimizer and the estimator, or raise a `MetaKDError`."""
    if not isinstance(student, nn.Module):
        raise MetaKDError(f"student must be an nn.Module with a trainable parameter, got {type(student).__name__}")
    if not any(p.requires_grad for p in student.parameters()):
        raise MetaKDError("the student has no trainable parameter; call requires_grad_(True) on those to train")
    optimizers(optimizer)
    checked_estimator(estimator)


def check_sharded(student: nn.Module, optimizer: Optimizers, inner: Any) -> None:
    """Check that each process can compute its part of an inner step of a sharded student, or raise a `MetaKDError`."""
    if not is_sharded(student):
        return
    kinds = {type(one).__name__ for one in optimizers(optimizer)}
    if not isinstance(inner, str) or (inner == "mirror" and "Muon" in kinds):
        what = "inner='mirror' of Muon" if isinstance(inner, str) else "a torchopt transformation as inner="
        raise MetaKDError(
            f"{what} may need whole parameters, but each process holds parts of a sharded student (fully_shard); use "
            "inner='sgd', or inner='mirror' with an optimizer that acts on each entry, such as AdamW"
        )


def check_sharded_terms(student: nn.Module, learned: Params) -> None:
    """Check that a sharded student has no terms with parameters to learn, or raise a `MetaKDError`."""
    if learned and is_sharded(student):
        raise MetaKDError(
            f"the parameters {', '.join(learned)} cannot be learned with a sharded student (fully_shard); freeze them "
            "with requires_grad_(False), and learn them with an unsharded student"
        )


def check_whole(student: nn.Module) -> None:
    """Check that one process can run the student on its own, or raise a `MetaKDError`."""
    if is_sharded(student):
        raise MetaKDError(
            "balancer.problem, check_hypergradient and diagnose run the student in one process, but a sharded one "
            "(fully_shard) needs all of them; check the student before it is sharded"
        )


def validated(student: nn.Module, optimizer: Optimizers, estimator: Estimator) -> Memory:
    """Run `validate`: raise its errors, show its warnings once, and return what estimators should know.

    Raises:
        MetaKDError: a finding is an error.
    """
    findings = validate(student, optimizer, estimator)
    if errors := [str(finding) for finding in findings if finding.level == "error"]:
        raise MetaKDError("\n".join(errors))
    if said := [str(finding) for finding in findings if finding.level == "warning"]:
        warnings.warn("\n".join(said), stacklevel=3)
    return Memory(forward_mode=None if all(finding.forward_mode for finding in findings) else False)


def check_weighting(weighting: Any, order: str) -> None:
    """Check that the weight model is a module that fits the order of the two steps, or raise a `MetaKDError`."""
    if not isinstance(weighting, nn.Module):
        raise MetaKDError(f"weighting must be an nn.Module (features, batch) -> (B, M), got {type(weighting).__name__}")
    if order not in ("sequential", "simultaneous"):
        raise MetaKDError(f"order must be 'sequential' or 'simultaneous', got {order!r}")
    if order == "simultaneous" and hasattr(weighting, "from_influence"):
        raise MetaKDError(
            f"{type(weighting).__name__} looks ahead with weights of zero, so order='simultaneous' would never move "
            "the student; use order='sequential'"
        )


def trained_elsewhere(optimizer: Optimizers, teacher: Any) -> Iterator[torch.Tensor]:
    """The parameters that are no term's to learn: those of the student's optimizer and of the teacher's modules."""
    for one in optimizers(optimizer):
        for group in one.param_groups:
            yield from group["params"]
    for part in members(teacher) or [teacher]:
        owner = getattr(part, "__self__", part)  # of a method
        if isinstance(owner, nn.Module):
            yield from owner.parameters()


def check_teacher(teacher: Any) -> None:
    """Check that the teacher is None, a callable object or a sequence of these, or raise a `MetaKDError`."""
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
    """The weight model's dtype beside a student parameter: real, and at least float32."""
    return torch.promote_types(like.dtype.to_real(), torch.float32)


def default_weighting(student: FunctionalStudent, width: int | None, terms: int) -> LossMLP:
    """BiKD's weight model on the student's device; its random start leaves the generators unchanged."""
    like = next(iter(student.trainable().values()))
    with student.untouched():
        return LossMLP(width, terms).to(like.device, weighting_dtype(like))
