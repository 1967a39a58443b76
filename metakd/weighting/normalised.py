"""Another model's weights, normalised over the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakd._basics.checks import check
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting.base import default_optimizer, shares


class Normalised(nn.Module):
    """Another model's weights, scaled so that the weights of a batch sum to its size.

    `w_ik = B m_ik / sum_jl m_jl` with the model's weights `m`. The coefficients in the balancer's
    `(1/B) sum_ik w_ik l_ik` then sum to one. If all the model's weights are zero, so are these.

    A sample's weight depends on its batch, and the hypergradient goes through the sum. In a batch of one sample
    with one term the weight is always one and there is nothing to learn: use `DataLoader(drop_last=True)`.

    Shapes: features `(B, F)`, result `(B, M)`.

    Source: Shu et al., "Meta-Weight-Net" (NeurIPS 2019), whose code for imbalanced classes normalises this way. Here
    any model may be wrapped, with several terms.

    Args:
        model: a weight model, any `nn.Module` `(features, batch) -> (B, M)` without negative weights.

    Raises:
        MetaKDError: `model` is not a module; in a call, one of its weights is negative.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import ClassTable, Normalised
        >>> table = ClassTable(classes=2, terms=1, output="identity")
        >>> table.free.data = torch.tensor([[1.0], [3.0]])
        >>> Normalised(table)(torch.zeros(3, 1), Batch(None, torch.tensor([0, 1, 1]))).detach().flatten()
        tensor([0.4286, 1.2857, 1.2857])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise MetaKDError(
                f"Normalised wraps a weight model, an nn.Module (features, batch) -> (B, M), got {type(model).__name__}"
            )
        self.model = model

    def default_optimizer(self) -> torch.optim.Optimizer:
        """What the wrapped model asks for."""
        return default_optimizer(self.model)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        weights: Tensor = self.model(features, batch)
        if weights.numel():
            check(self._judge, weights.min())
        return shares(weights, dim=(0, 1)) * weights.shape[0]

    def _judge(self, least: float) -> None:
        if least < 0:
            raise MetaKDError(
                f"the weight {least:g} is negative and cannot be normalised; give {type(self.model).__name__} an "
                "output that is never negative, such as output='sigmoid' or 'softplus'"
            )
