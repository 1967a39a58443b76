"""A block of work that happens as a whole or not at all."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parameter import is_lazy

from metakd.student import FunctionalStudent
from metakd.weighting_step import WeightingStep


class Snapshot:
    """All that a step of a balancer may change in the user's modules, as it was before.

    Args:
        student: its buffers and the generators are kept; its parameters are never written to.
        step: the weight model's parameters, buffers and gradients are kept, and its optimizer's state from
            `keep_optimizer()` on.

    Attributes:
        start: where a pass of the student from here starts.
    """

    def __init__(self, student: FunctionalStudent, step: WeightingStep) -> None:
        self._step, self._pending = step, step.pending
        self._optimizer_state: dict[str, object] | None = None
        self.start, self._put_student_back = student.keep()
        self._buffers = [
            (owner, name, buffer, None if is_lazy(buffer) else buffer.detach().clone())
            for owner in step.weighting.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._weights = [(p, p.detach().clone(), p.grad) for p in step.weighting.parameters() if not is_lazy(p)]

    def keep_optimizer(self) -> None:
        """Copy the state of the weight model's optimizer too; called right before it steps."""
        if self._step.optimizer is not None:
            self._optimizer_state = copy.deepcopy(self._step.optimizer.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit."""
        self._put_student_back()
        for owner, name, buffer, value in self._buffers:
            if value is not None:
                buffer.copy_(value)
                owner._buffers[name] = buffer
        for p, value, grad in self._weights:
            p.copy_(value)
            p.grad = grad
        if self._step.optimizer is not None and self._optimizer_state is not None:
            self._step.optimizer.load_state_dict(self._optimizer_state)
        self._step.pending = self._pending


@contextmanager
def all_or_nothing(snapshot: Snapshot) -> Iterator[None]:
    """Put everything back where the block ends in an exception, Ctrl-C included.

    Example:
        >>> from torch import nn
        >>> norm, table = nn.BatchNorm1d(2), nn.Linear(1, 1)
        >>> try:
        ...     with all_or_nothing(Snapshot(FunctionalStudent(norm), WeightingStep(table, None, 1))):
        ...         _ = norm(torch.randn(4, 2))
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(norm.running_mean)
        tensor([0., 0.])
    """
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
