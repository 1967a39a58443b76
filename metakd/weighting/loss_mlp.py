"""A small network from a sample's losses to its weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._basics.positive_int import positive_int
from metakd._virtual.precision import as_written
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.weighting.base import output_map


class LossMLP(nn.Module):
    """Weights as a learned function of a sample's features, by default of its losses.

    `w_i = map(W_L tanh(... tanh(W_1 x_i + b_1) ...) + b_L)`: one multilayer perceptron for all samples,
    which therefore also weights samples it has not been trained on.

    Shapes: features `(B, F)`, result `(B, M)`.

    Source: BiKD (PAKDD 2026, arXiv 2605.17839), whose weight model has tanh layers of 64 units and
    independent sigmoids, with no sum-to-one constraint. The idea of a network from losses to weights is from Shu
    et al., "Meta-Weight-Net" (NeurIPS 2019). The other output maps are our addition; `Normalised` normalises the
    weights over the batch.

    The model runs in its parameters' dtype, outside of autocast: it is tiny, and its hypergradient needs the digits.

    Args:
        features: F, or None to read it off the first batch.
        terms: M, the number of weights per sample.
        hidden: units of each hidden layer; empty for a linear model.
        output: the map to weights: `"sigmoid"` (each in (0, 1)), `"softplus"` (each positive), `"softmax"` (positive,
            with sum one over the terms) or `"identity"`.
        activation: class of the module after each hidden layer, such as `nn.Tanh` or `nn.ReLU`.

    Raises:
        MetaKDError: a size is not a positive integer, the output map is unknown, or the activation is not a class of
            modules; in a call, features are not `(B, F)`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.weighting import LossMLP
        >>> weights = LossMLP(features=2, terms=3, output="softmax")(torch.rand(5, 2), Batch(None))
        >>> weights.shape, bool(torch.allclose(weights.sum(1), torch.ones(5)))
        (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        features: int | None,
        terms: int,
        hidden: Sequence[int] = (64, 64),
        *,
        output: str = "sigmoid",
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise MetaKDError(f"hidden is {hidden!r}, but must be a sequence of layer sizes; write hidden=(64,)")
        if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
            raise MetaKDError(f"activation is {activation!r}, but must be a class of modules; write activation=nn.ReLU")
        self.terms = positive_int(terms, "terms")
        self.output = output
        output_map(output)
        sizes = [positive_int(units, f"hidden[{i}]") for i, units in enumerate(hidden)] + [self.terms]
        layers: list[nn.Module] = [_first(features, sizes[0])]
        for before, after in pairwise(sizes):
            layers += [activation(), nn.Linear(before, after)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        known = None if is_lazy(first.weight) else first.weight.shape[1]
        if features.ndim != 2 or (known is not None and features.shape[1] != known):
            raise MetaKDError(
                f"the features have shape {tuple(features.shape)}, expected (B, {known or 'F'}); build the "
                f"model as LossMLP(features={features.shape[-1] if features.ndim == 2 else 'F'}, ...) or "
                "change the features function to return one row of numbers per sample"
            )
        with as_written(features.device.type), nullcontext() if known else self._quiet_first_batch(features):
            return output_map(self.output).apply(self.layers(features.to(first.weight.dtype)))

    def _quiet_first_batch(self, features: Tensor) -> AbstractContextManager[None]:
        # A lazy layer draws its weights in the first batch. That must not change the training's random numbers.
        return torch.random.fork_rng([features.device] if features.is_cuda else [])


def _first(features: int | None, units: int) -> nn.Module:
    if features is not None:
        return nn.Linear(positive_int(features, "features"), units)
    with warnings.catch_warnings():
        # Older torch warns at every use that lazy layers are new.
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        return nn.LazyLinear(units)
