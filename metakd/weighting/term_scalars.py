"""One learned weight per term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd.batch import Batch
from metakd.weighting.base import output_map, starting_point


class TermScalars(nn.Module):
    """One weight per term, the same for every sample.

    `w_ik = map(a_k)` with one free number `a_k` per term.

    Shapes: features `(B, F)` (only B is used), result `(B, M)`.

    Source: Liu et al., "Auto-lambda: Disentangling Dynamic Task Relationships" (TMLR 2022), who learn one free number
    per task by the same one-step lookahead (`recipes.auto_lambda`). Here an output map keeps the weights in range.

    Args:
        terms: M, the number of terms.
        init: the initial weight of each term; ignored with `"softmax"`, which starts uniform.
        output: the map to weights, see `LossMLP`.

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

    def __init__(self, terms: int, *, init: float | None = 1.0, output: str = "softplus") -> None:
        super().__init__()
        self.terms = positive_int(terms, "terms")
        self.output = output
        self.free = nn.Parameter(torch.full((self.terms,), starting_point(init, output)))

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        return output_map(self.output).apply(self.free).expand(features.shape[0], self.terms)
