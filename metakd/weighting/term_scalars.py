"""One learned weight per term."""

from __future__ import annotations

from torch import Tensor

from metakd._basics.positive_int import positive_int
from metakd.batch import Batch
from metakd.weighting.base import FreeNumbers


class TermScalars(FreeNumbers):
    """One weight per term, the same for every sample.

    `w_ik = map(a_k)` with one free number `a_k` per term.

    By default weights stay between 0 and twice their start. Without an upper end, as with `"softplus"`, they may grow
    without bound: larger weights are a longer step of the student, which looks better one step ahead. The balancer's
    default optimizer for it is Adam at 0.1 without weight decay.

    Shapes: features `(B, F)` (only B is used), result `(B, M)`.

    Source: Liu et al., "Auto-lambda: Disentangling Dynamic Task Relationships" (TMLR 2022), who learn one free number
    per task by the same one-step lookahead (`recipes.auto_lambda`). Here an output map keeps the weights in range.

    Args:
        terms: M, the number of terms.
        init: the initial weight of each term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights: `"bounded"` (each in (0, 2 init)) or one of those of `LossMLP`.

    Raises:
        MetaKDError: `terms` is not a positive integer, the output map is unknown or cannot give `init`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import TermScalars
        >>> TermScalars(terms=2, init=0.5)(torch.zeros(3, 1), Batch(None)).detach()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(self, terms: int, *, init: float | None = 1.0, output: str = "bounded") -> None:
        super().__init__((positive_int(terms, "terms"),), init, output)
        self.terms = terms

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        return self.output_map.apply(self.free).expand(features.shape[0], self.terms)
