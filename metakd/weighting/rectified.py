"""Weights computed from the influence of each sample, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting.base import shares


class Rectified(nn.Module):
    """Weights in proportion to how much each loss lowers the meta loss, clipped at zero.

    `w_ik = B max(0, -I_ik) / sum_jl max(0, -I_jl)` with the influence `I_ik`, the derivative of the meta
    loss with respect to `w_ik` at `w = 0` up to a positive factor. The coefficients in the balancer's
    `(1/B) sum_ik w_ik l_ik` then sum to one. If no sample helps, all weights are zero.

    With `over="sample"` each sample distributes a weight of one over its terms,
    `w_ik = max(0, -I_ik) / sum_l max(0, -I_il)`, equally if no term helps.

    The model has no parameters. In calls without a hypergradient there is no influence, and all weights are equal: one,
    or 1/M over a sample.

    Shapes: influence `(B, M)`, result `(B, M)`.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning" (ICML 2018). With one term it is the
    paper's rule; several terms and `over="sample"` are our additions.

    Args:
        terms: M, the number of terms.
        over: normalise over the `"batch"` or over each `"sample"`.

    Raises:
        MetaKDError: `terms` is not a positive integer, or `over` is unknown; in a call, the influence is not
            `(B, M)`.

    Examples:
        >>> import torch
        >>> from metakd.weighting import Rectified
        >>> Rectified().from_influence(torch.tensor([[-3.0], [-1.0], [5.0], [0.0]]))
        tensor([[3.],
                [1.],
                [0.],
                [0.]])
    """

    def __init__(self, terms: int = 1, *, over: str = "batch") -> None:
        super().__init__()
        self.terms = positive_int(terms, "terms")
        if over not in ("batch", "sample"):
            raise MetaKDError(f"Rectified normalises over the 'batch' or each 'sample', not over {over!r}")
        self.over = over

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return equal weights, shape `(B, M)`, for calls without an influence."""
        return features.new_full((features.shape[0], self.terms), 1.0 if self.over == "batch" else 1.0 / self.terms)

    def lookahead_weights(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights at which the influence is taken: zeros `(B, M)`."""
        return features.new_zeros(features.shape[0], self.terms)

    def from_influence(self, influence: Tensor) -> Tensor:
        """Return the detached weights for an influence `(B, M)`, same shape."""
        if influence.ndim != 2 or influence.shape[1] != self.terms:
            raise MetaKDError(
                f"the influence has shape {tuple(influence.shape)}, expected (B, {self.terms}); build the "
                "weight model with one column per term: Rectified(terms=...)"
            )
        helpful = influence.detach().clamp(max=0.0).abs()
        if self.over == "sample":
            any_helps = helpful.sum(dim=1, keepdim=True) > 0
            return torch.where(any_helps, shares(helpful, dim=(1,)), 1.0 / self.terms)
        return shares(helpful, dim=(0, 1)) * influence.shape[0]
