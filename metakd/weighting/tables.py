"""Tables of learned weights: one row for each group of samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metakd._basics.columns import RESERVED
from metakd._basics.positive_int import positive_int
from metakd._basics.sizes import is_integer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import check_range
from metakd.weighting.base import FreeNumbers


class GroupTable(FreeNumbers):
    """One weight per group and term, looked up by a column of integers in the batch.

    `w_ik = map(A[g_i, k])` with a table `A` of free numbers and the group `g_i` of sample i: its source, annotator,
    domain, or whatever the column says. A group's weight is learned from all its samples, so a table of few groups has
    a strong signal. `ClassTable` and `SampleTable` are the same table, read by label and by position.

    The balancer's default optimizer for it is Adam at 0.1 without weight decay: a free number has to move by about 2
    to bring a weight near an end of its range. Optimizers with momentum or weight decay also move rows without a sample
    in the batch.

    Shapes: features `(B, F)` (only B is used), the column `(B,)` integers, result `(B, M)`.

    Source: with one row per sample and a clamp, AMAL's table (Sivasubramanian et al., AAAI 2023). Rows by source are
    our choice.

    Args:
        column: the name of the column, a key of `Batch.columns`; or `"targets"` or `"index"`, the batch's own.
        groups: the number of groups, the table's rows.
        terms: M, the number of terms.
        init: the initial weight of every group and term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights: `"bounded"` (each in (0, 2 init)) or one of those of `LossMLP`.

    Raises:
        MetaKDError: a size is not a positive integer, the output map is unknown or cannot give `init`; in a call, the
            column is missing, is not `(B,)` integers, or is out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import GroupTable
        >>> table = GroupTable("source", groups=20, terms=1, init=0.5, output="sigmoid")
        >>> table(torch.zeros(2, 1), Batch(None, columns={"source": torch.tensor([19, 0])})).detach()
        tensor([[0.5000],
                [0.5000]])
        >>> table.all_weights().shape
        torch.Size([20, 1])
    """

    _groups, _group = "groups", "group"  # the argument's name, and what a row is

    def __init__(
        self, column: str, groups: int, terms: int, *, init: float | None = 1.0, output: str = "bounded"
    ) -> None:
        if not isinstance(column, str) or column in _NO_COLUMNS:
            raise MetaKDError(
                f'column is {column!r}, but must name a column of the batch, such as "source" of '
                'Batch(columns={"source": ids}), or be "targets" or "index"'
            )
        super().__init__((positive_int(groups, self._groups), positive_int(terms, "terms")), init, output)
        self.column, self.groups, self.terms = column, groups, terms

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        rows, name = self._rows(batch, features.shape[0]), self._where()
        advice = f"the table has {self.groups} rows: build it with one for each {self._group}, or correct the values"
        rows = check_range(rows, self.groups, name, advice)
        return self.output_map.apply(F.embedding(rows.to(self.free.device).long(), self.free))

    @torch.no_grad()
    def all_weights(self) -> Tensor:
        """The weights of all groups, shape `(groups, M)`, detached."""
        return self.output_map.apply(self.free)

    def _where(self) -> str:
        return f"batch.{self.column}" if self.column in _FIELDS else f"batch.columns[{self.column!r}]"

    def _rows(self, batch: Batch, size: int) -> Tensor:
        """The row of each sample, `(B,)`, or raise."""
        of_columns = batch.columns or {}
        rows = getattr(batch, self.column) if self.column in _FIELDS else of_columns.get(self.column)
        needs = f"{type(self).__name__} needs {self._where()}"
        cure = _FIELDS.get(
            self.column, f"let the loader yield (inputs, targets, {{{self.column!r}: ids}}), or pass Batch(columns=...)"
        )
        if not isinstance(rows, Tensor):
            got = "None" if rows is None else type(rows).__name__
            known = "" if self.column in _FIELDS else f" (the batch has the columns {list(of_columns)})"
            raise MetaKDError(f"{needs}, which is {got}{known}; {cure}")
        if rows.shape != (size,) or not is_integer(rows):
            raise MetaKDError(
                f"{needs} as integers of shape ({size},), one per sample, got {rows.dtype} of shape "
                f"{tuple(rows.shape)}; {cure}"
            )
        return rows


_FIELDS = {  # columns that are fields of the batch, and how it gets them
    "targets": "pass the class of each sample as Batch(targets=...)",
    "index": "let the loader yield (inputs, targets, index), or pass the positions as Batch(index=...)",
}
_NO_COLUMNS = set(RESERVED) - set(_FIELDS)


class ClassTable(GroupTable):
    """One weight per class and term, looked up by the label.

    `w_ik = map(A[y_i, k])` with a table `A` of free numbers.

    Shapes: features `(B, F)` (only B is used), `batch.targets` `(B,)` integers, result `(B, M)`.

    Source: long-tailed recognition sets such class weights from class counts, as Cui et al., "Class-Balanced Loss Based
    on Effective Number of Samples" (CVPR 2019). Here they are learned.

    Args:
        classes: the number of classes, the table's rows.
        terms: M, the number of terms.
        init: the initial weight of every class and term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights: `"bounded"` (each in (0, 2 init)) or one of those of `LossMLP`.

    Raises:
        MetaKDError: a size is not a positive integer, the output map is unknown or cannot give `init`; in a call,
            targets are missing, are not `(B,)` integers, or are out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import ClassTable
        >>> batch = Batch(None, targets=torch.tensor([0, 2]))
        >>> ClassTable(classes=3, terms=2, init=0.5)(torch.zeros(2, 1), batch).detach()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    _groups, _group = "classes", "class"

    def __init__(self, classes: int, terms: int, *, init: float | None = 1.0, output: str = "bounded") -> None:
        super().__init__("targets", classes, terms, init=init, output=output)


class SampleTable(GroupTable):
    """One weight per training sample and term, looked up by the sample's position in the training set.

    `w_ik = map(A[index_i, k])` with a table `A` of free numbers.

    A row has a gradient only when its sample is in the batch. Optimizers with momentum, such as Adam, move the other
    rows too; use `torch.optim.SGD` to avoid that.

    Shapes: features `(B, F)` (only B is used), `batch.index` `(B,)` integers, result `(B, M)`.

    Source: Sivasubramanian et al., AMAL ("Adaptive mixing of auxiliary losses in supervised learning", AAAI
    2023), who clamp the weights to [0, 2] after each step (`recipes.amal`). Here an output map keeps them in range.

    Args:
        samples: the number of training samples, the table's rows.
        terms: M, the number of terms.
        init: the initial weight of every sample and term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights: `"bounded"` (each in (0, 2 init)) or one of those of `LossMLP`.

    Raises:
        MetaKDError: a size is not a positive integer, the output map is unknown or cannot give `init`; in a call, the
            index is missing, is not `(B,)` integers, or is out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import SampleTable
        >>> batch = Batch(None, index=torch.tensor([7, 0]))
        >>> SampleTable(samples=8, terms=1, init=0.5)(torch.zeros(2, 1), batch).detach()
        tensor([[0.5000],
                [0.5000]])
    """

    _groups, _group = "samples", "training sample"

    def __init__(self, samples: int, terms: int, *, init: float | None = 1.0, output: str = "bounded") -> None:
        super().__init__("index", samples, terms, init=init, output=output)
