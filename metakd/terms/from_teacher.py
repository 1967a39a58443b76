"""One teacher of an ensemble, for a term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.base import Term
from metakd.terms.reading import check_not_stacked


@dataclass(frozen=True)
class FromTeacher:
    """A term that learns from one teacher of an ensemble.

    `loss_i = term(outputs, batch with batch.teacher[teacher] as its teacher)_i`. A term for each teacher gives each its
    own weights: how much to trust it, and for which samples.

    Shapes: as the term's; `batch.teacher` is a list or tuple of teachers' outputs, result `(B,)`.

    Args:
        term: any term that reads `batch.teacher`.
        teacher: the position in the list.

    Raises:
        MetaKDError: the term is not callable or the position no integer; in a call, `batch.teacher` is not a list or
            tuple, or has too few entries; and what the term raises.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import FromTeacher, SoftTarget
        >>> teachers = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
        >>> terms = {f"teacher {k}": FromTeacher(SoftTarget(), k) for k in range(2)}
        >>> [term(torch.tensor([[4.0, 0.0]]), Batch(None, teacher=teachers)) for term in terms.values()]
        [tensor([0.]), tensor([7.3939])]
    """

    term: Term
    teacher: int
    uses_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.term) or isinstance(self.term, type):
            raise MetaKDError(f"FromTeacher needs a term, got {self.term!r}; write FromTeacher(SoftTarget(), 0)")
        if type(self.teacher) is not int or self.teacher < 0:
            raise MetaKDError(f"teacher is {self.teacher!r}, but must be a position in the list of teachers: 0, 1, ...")

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        teachers = batch.teacher
        if not isinstance(teachers, tuple | list):
            check_not_stacked(teachers)
            raise MetaKDError(
                f"FromTeacher picks teacher {self.teacher} of a list of outputs, but batch.teacher is "
                f"{'None' if teachers is None else 'of type ' + type(teachers).__name__}; pass "
                "BilevelLossBalancer(..., teacher=[first, second]), or the outputs as Batch(teacher=[...])"
            )
        if self.teacher >= len(teachers):
            raise MetaKDError(
                f"there is no teacher {self.teacher}: batch.teacher has {len(teachers)} outputs, counted from 0"
            )
        return self.term(outputs, batch._replace(teacher=teachers[self.teacher]))
