"""A loader's item as a batch that has all its terms may ask for."""

from collections.abc import Callable
from typing import Any

from metakd._virtual.functional import FunctionalStudent
from metakd._virtual.teacher import Teacher, teacher_outputs
from metakd.batch import Batch, check_size
from metakd.errors import MetaKDError, blamed
from metakd.terms import Term


def read_batch(
    item: Any,
    what: str,
    batch_fn: Callable[[Any], Batch],
    teacher: Teacher | None,
    student: FunctionalStudent,
    needed_by: Term | None = None,
) -> Batch:
    """The item as a batch, with the teacher's outputs where anything may ask for them.

    Args:
        item: as the loader yields it, or a batch already.
        what: names it in errors.
        batch_fn: item -> `Batch`.
        teacher: run unless the batch has its outputs; or None.
        student: whose buffers and random numbers the teacher must not touch.
        needed_by: the one term that will read the batch, if there is just one.

    Raises:
        MetaKDError: the item is no batch, is empty or contradicts itself, or the teacher failed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> item, student = torch.ones(4, 2), FunctionalStudent(nn.Linear(2, 3))
        >>> read_batch(item, "the batch", Batch, nn.Linear(2, 3), student).teacher.shape
        torch.Size([4, 3])
    """
    with blamed(f"reading {what}"):
        batch = item if isinstance(item, Batch) else batch_fn(item)
    if not isinstance(batch, Batch):
        raise MetaKDError(
            f"batch_fn must return a metakd.Batch, got {type(batch).__name__}; write Batch(inputs, targets)"
        )
    check_size(batch, what)
    if teacher is None or batch.teacher is not None or not getattr(needed_by, "uses_teacher", True):
        return batch
    with student.untouched():
        return batch._replace(teacher=teacher_outputs(teacher, batch.inputs))
