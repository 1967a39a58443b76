"""Tables of learned weights: one row per class, or one per training sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd._basics.sizes import is_integer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import check_range
from metakd.weighting.base import output_map, starting_point


class _Table(nn.Module):
    """Rows of free numbers; each sample looks one up by a field of its batch."""

    _field: str
    _row: str
    _cure: str

    def __init__(self, rows: int, terms: int, init: float | None, output: str) -> None:
        super().__init__()
        self.terms = positive_int(terms, "terms")
        self.output = output
        self.free = nn.Parameter(torch.full((rows, self.terms), starting_point(init, output)))

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        name, rows, size = f"batch.{self._field}", getattr(batch, self._field), features.shape[0]
        if not isinstance(rows, Tensor):
            got = "None" if rows is None else type(rows).__name__
            raise MetaKDError(f"{type(self).__name__} needs {name}, which is {got}; {self._cure}")
        if rows.shape != (size,) or not is_integer(rows):
            raise MetaKDError(
                f"{type(self).__name__} needs {name} as integers of shape ({size},), one per sample, got "
                f"{rows.dtype} of shape {tuple(rows.shape)}; {self._cure}"
            )
        count = self.free.shape[0]
        advice = f"the table has {count} rows: build it with one for each {self._row}, or correct the values"
        check_range(rows, count, name, advice)
        return output_map(self.output).apply(F.embedding(rows.to(self.free.device).long(), self.free))


class ClassTable(_Table):
    """One weight per class and term, looked up by the label.

    `w_ik = map(A[y_i, k])` with a table `A` of free numbers.

    Shapes: features `(B, F)` (only B is used), `batch.targets` `(B,)` integers, result `(B, M)`.

    Source: long-tailed recognition sets such class weights from class counts, as Cui et al., "Class-Balanced Loss Based
    on Effective Number of Samples" (CVPR 2019). Here they are learned.

    Args:
        classes: the number of classes, the table's rows.
        terms: M, the number of terms.
        init: the initial weight of every class and term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights, see `LossMLP`.

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

    _field, _row = "targets", "class"
    _cure = "pass the class of each sample as Batch(targets=...)"

    def __init__(self, classes: int, terms: int, *, init: float | None = 1.0, output: str = "softplus") -> None:
        super().__init__(positive_int(classes, "classes"), terms, init, output)


class SampleTable(_Table):
    """One weight per training sample and term, looked up by the sample's position in the training set.

    `w_ik = map(A[index_i, k])` with a table `A` of free numbers.

    A row has a gradient only when its sample is in the batch. Optimizers with momentum or weight decay, such as the
    balancer's default Adam, move the other rows too; use `torch.optim.SGD` to avoid that.

    Shapes: features `(B, F)` (only B is used), `batch.index` `(B,)` integers, result `(B, M)`.

    Source: Sivasubramanian et al., AMAL ("Adaptive mixing of auxiliary losses in supervised learning", AAAI
    2023), who clamp the weights to [0, 2] after each step (`recipes.amal`). Here an output map keeps them in range.

    Args:
        samples: the number of training samples, the table's rows.
        terms: M, the number of terms.
        init: the initial weight of every sample and term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights, see `LossMLP`.

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

    _field, _row = "index", "training sample"
    _cure = "let the loader yield (inputs, targets, index), or pass the positions as Batch(index=...)"

    def __init__(self, samples: int, terms: int, *, init: float | None = 1.0, output: str = "softplus") -> None:
        super().__init__(positive_int(samples, "samples"), terms, init, output)
