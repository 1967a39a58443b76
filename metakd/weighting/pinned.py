"""Another model's weights for some samples, and a given weight for the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting.base import default_optimizer


class Pinned(nn.Module):
    """Another model's weights, but a given weight for samples whose value in a column is not 0.

    `w_ik = weight` where `batch.columns[column]_i != 0`, else the model's. It is for meta images among the training
    images (`metakd.meta_in_training`): they are known to be good, and have neither a source nor a position in the
    training set. In a batch without the column all weights are the model's. Pinned samples have no part in the
    hypergradient.

    Shapes: features `(B, F)`, the column `(B,)` integers, result `(B, M)`.

    Source: our own.

    Args:
        model: a weight model, any `nn.Module` `(features, batch) -> (B, M)`.
        weight: of the pinned samples, in every term.
        column: the name of the column.

    Raises:
        MetaKDError: `model` is not a module, or the weight is not finite.

    Examples:
        >>> from metakd import Batch
        >>> from metakd.weighting import GroupTable, Pinned
        >>> batch = Batch(None, columns={"source": torch.tensor([3, -1]), "from_meta": torch.tensor([0, 1])})
        >>> Pinned(GroupTable("source", 4, terms=1), 0.3)(torch.zeros(2, 1), batch).detach()
        tensor([[1.0000],
                [0.3000]])
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, *, column: str = "from_meta") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise MetaKDError(
                f"Pinned wraps a weight model, an nn.Module (features, batch) -> (B, M), got {type(model).__name__}"
            )
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MetaKDError(f"weight is {weight!r}, but must be a finite number, such as 1.0 or 0.3")
        self.model, self.weight, self.column = model, weight, column

    def default_optimizer(self) -> torch.optim.Optimizer:
        """What the wrapped model asks for."""
        return default_optimizer(self.model)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        columns = batch.columns or {}
        if self.column not in columns:
            learned: Tensor = self.model(features, batch)
            return learned
        pinned = columns[self.column] != 0

        def known(values: Tensor) -> Tensor:
            return values.masked_fill(pinned.to(values.device), 0)  # any row of a table does: it is replaced below

        index = None if batch.index is None else known(batch.index)
        others = {name: known(values) for name, values in columns.items()}
        weights: Tensor = self.model(features, batch._replace(index=index, columns=others))
        return torch.where(pinned.to(weights.device).unsqueeze(1), self.weight, weights)
