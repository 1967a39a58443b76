"""The directional derivatives of all losses from one forward pass with dual numbers."""

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from metakd._autodiff import Gradients, gradients
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


def in_weights(weighted: WeightedLosses, meta: Params, batch: Any, tangent: Tensor) -> Gradients:
    """The gradient in meta of (1/B) sum_ik w_ik times the losses' tangent; call it outside of dual numbers."""
    if weighted.given is not None:
        return {**dict.fromkeys(meta), weighted.given: tangent / tangent.shape[0]}
    return gradients((weighted.weights(meta, batch) * (tangent / tangent.shape[0])).sum(), meta)
