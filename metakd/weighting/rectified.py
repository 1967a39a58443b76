"""Weights straight from the influence of each sample: no parameters, nothing to train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting.base import positive_int, shares


class Rectified(nn.Module):
    """Weights in proportion to how much each sample's term lowers the meta loss, and none below zero.

    `w_ik = B max(0, -I_ik) / sum_jl max(0, -I_jl)` with the influence `I_ik`, the derivative of the meta
    loss with respect to `w_ik` at `w = 0` up to a positive factor. The weights of a batch sum to B, so
    that the balancer's `(1/B) sum_ik w_ik l_ik` weights its losses with numbers that sum to one. Where no
    sample helps, all weights are zero.

    With `over="sample"` every sample shares out a weight of one among its own terms,
    `w_ik = max(0, -I_ik) / sum_l max(0, -I_il)`, in equal parts where none of them helps.

    It has no parameters. Where no influence is known, in calls without a hypergradient, the weights are equal: one,
    or 1/M over a sample.

    Shapes: influence `(B, M)`, result `(B, M)`.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning" (ICML 2018). Ours differs in
    weighting several terms at once; with one term it is the paper's rule. Over a sample it is the rule of RW-KD:
    see `recipes.rw_kd`.

    Args:
        terms: M, the number of terms.
        over: what the weights are shared out over, the `"batch"` or each `"sample"`.

    Raises:
        MetaKDError: `terms` not a positive integer, or an unknown `over`; when called, an influence that is not
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
            raise MetaKDError(f"Rectified shares weights out over the 'batch' or each 'sample', not over {over!r}")
        self.over = over

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return equal weights, shape `(B, M)`: the answer where no influence is known."""
        return features.new_full((features.shape[0], self.terms), 1.0 if self.over == "batch" else 1.0 / self.terms)

    def lookahead_weights(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights at which the influence is taken, zeros of shape `(B, M)`."""
        return features.new_zeros(features.shape[0], self.terms)

    def from_influence(self, influence: Tensor) -> Tensor:
        """Return the weights that an influence `(B, M)` asks for, same shape, detached."""
        if influence.ndim != 2 or influence.shape[1] != self.terms:
            raise MetaKDError(
                f"the influence has shape {tuple(influence.shape)}, expected (B, {self.terms}); build the "
                "weight model with one column a term: Rectified(terms=...)"
            )
        helpful = influence.detach().clamp(max=0.0).abs()
        if self.over == "sample":
            any_helps = helpful.sum(dim=1, keepdim=True) > 0
            return torch.where(any_helps, shares(helpful, dim=(1,)), 1.0 / self.terms)
        return shares(helpful, dim=(0, 1)) * influence.shape[0]
