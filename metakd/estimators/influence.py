"""The directional derivatives of all losses from one forward pass with dual numbers."""

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from metakd.errors import MetaKDError
from metakd.estimators.dual import dual_numbers, duals
from metakd.estimators.problem import WeightedLosses
from metakd.inner import Params


def influence(weighted: WeightedLosses, params: Params, batch: Any, u: Params) -> Tensor:
    """<grad l_ik, u> for all samples and terms, (B, M); raise if an operation drops the tangent."""
    with dual_numbers():
        losses = weighted.losses(duals(params, u), batch)
        tangent: Tensor | None = forward_ad.unpack_dual(losses).tangent
        if tangent is None:
            raise MetaKDError("an operation of the model or of the terms drops its tangent")
        return tangent.detach()
