"""The benchmarks' tasks, small and in float64."""

from dataclasses import replace

from benchmarks.common.cases import CASES, Task
from metakd.batch import map_tensors


def task(case, steps, *, teacher=False):
    found = Task.build(replace(CASES[case], lr=0.05), steps, batch_size=3, teacher=teacher)
    return found._replace(
        student=found.student.double(),
        weighting=found.weighting.double(),
        batches=[map_tensors(_double, batch) for batch in found.batches],
        meta_batch=map_tensors(_double, found.meta_batch),
        teacher=found.teacher and found.teacher.double(),
    )


def _double(value):
    return value.double() if value.is_floating_point() else value
