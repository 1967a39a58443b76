"""Turns a loader's item into a batch with everything that terms may need."""

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
    """Read the item as a batch, and add the teacher's outputs unless the batch has them or its only term ignores them.

    `what` names the batch in errors. The teacher must not change the student's buffers, nor the generators.

    Raises:
        MetaKDError: the item is no batch, is empty or contradicts itself, or the teacher failed.
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
