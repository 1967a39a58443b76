"""Tables of learned weights: a row a class, or a row a training sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms.reading import check_range
from metakd.weighting.base import output_map, positive_int, starting_point


class _Table(nn.Module):
    """Rows of free numbers, looked up by an index a sample."""

    def __init__(self, rows: int, terms: int, init: float | None, output: str) -> None:
        super().__init__()
        self.terms = positive_int(terms, "terms")
        self.output = output
        self.free = nn.Parameter(torch.full((rows, self.terms), starting_point(init, output)))

    def _weights(self, rows: object, size: int, name: str, row: str, cure: str) -> Tensor:
        if not isinstance(rows, Tensor):
            got = "None" if rows is None else type(rows).__name__
            raise MetaKDError(f"{type(self).__name__} needs {name}, which is {got}; {cure}")
        integers = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
        if rows.shape != (size,) or not integers:
            raise MetaKDError(
                f"{type(self).__name__} needs {name} as integers of shape ({size},), one a sample, got "
                f"{rows.dtype} of shape {tuple(rows.shape)}; {cure}"
            )
        check_range(
            rows,
            self.free.shape[0],
            name,
            f"the table has {self.free.shape[0]} rows: build it with one for each {row}, or mend the values",
        )
        return output_map(self.output).apply(F.embedding(rows.to(self.free.device).long(), self.free))


class ClassTable(_Table):
    """One weight a class and term, looked up by the label.

    `w_ik = map(A[y_i, k])` with a table `A` of free numbers.

    Shapes: features `(B, F)` (only B is used), `batch.targets` `(B,)` integers, result `(B, M)`.

    Source: the class-wise weights that long-tailed recognition sets by hand from class counts, e.g. Cui et
    al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019). Ours differs in learning
    them.

    Args:
        classes: the number of classes, the table's rows.
        terms: M, the number of terms.
        init: the weight every class and term starts with; without effect with `"softmax"`.
        output: the map to weights: `"softplus"`, `"sigmoid"`, `"softmax"` over the terms, or
            `"identity"`.

    Raises:
        MetaKDError: a size that is not a positive integer, an unknown output map, or a start that it cannot
            give; when called, targets missing, not `(B,)` integers, or out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import ClassTable
        >>> batch = Batch(None, targets=torch.tensor([0, 2]))
        >>> ClassTable(classes=3, terms=2, init=0.5)(torch.zeros(2, 1), batch).detach()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(self, classes: int, terms: int, *, init: float | None = 1.0, output: str = "softplus") -> None:
        super().__init__(positive_int(classes, "classes"), terms, init, output)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        cure = "give the class of each sample as Batch(targets=...)"
        return self._weights(batch.targets, features.shape[0], "batch.targets", "class", cure)


class SampleTable(_Table):
    """One weight a training sample and term, looked up by the sample's position in the training set.

    `w_ik = map(A[index_i, k])` with a table `A` of free numbers.

    Shapes: features `(B, F)` (only B is used), `batch.index` `(B,)` integers, result `(B, M)`.

    Source: Sivasubramanian et al., AMAL ("Adaptive mixing of auxiliary losses in supervised learning", AAAI
    2023), a table of weights clamped to [0, 2] after each step, with a lookahead of the last layer: `recipes.amal`.
    Ours differs in that an output map keeps the weights in range.

    A row learns only when its sample is in the batch. An optimizer with momentum or weight decay, the
    balancer's default Adam among them, moves the other rows too; give `torch.optim.SGD` where that is not
    wanted.

    Args:
        samples: the number of training samples, the table's rows.
        terms: M, the number of terms.
        init: the weight every sample and term starts with; without effect with `"softmax"`.
        output: the map to weights: `"softplus"`, `"sigmoid"`, `"softmax"` over the terms, or
            `"identity"`.

    Raises:
        MetaKDError: a size that is not a positive integer, an unknown output map, or a start that it cannot
            give; when called, the index missing, not `(B,)` integers, or out of range.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import SampleTable
        >>> batch = Batch(None, index=torch.tensor([7, 0]))
        >>> SampleTable(samples=8, terms=1, init=0.5)(torch.zeros(2, 1), batch).detach()
        tensor([[0.5000],
                [0.5000]])
    """

    def __init__(self, samples: int, terms: int, *, init: float | None = 1.0, output: str = "softplus") -> None:
        super().__init__(positive_int(samples, "samples"), terms, init, output)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        cure = "let the loader yield (inputs, targets, index), or give the positions as Batch(index=...)"
        return self._weights(batch.index, features.shape[0], "batch.index", "training sample", cure)
