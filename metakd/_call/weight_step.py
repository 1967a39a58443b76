"""The weight model's side of a step: hypergradients are accumulated, averaged, and given to its optimizer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import with_zeros
from metakd._basics.together import clones, norm_of, scaled, summed
from metakd._call.optimizer_state import load_optimizer_state
from metakd.errors import MetaKDError
from metakd.estimators.problem import Mean, unchanged
from metakd.weighting.base import default_optimizer

Gradient = dict[str, Tensor]


class Pending(NamedTuple):
    """Hypergradients since the weight model's last step: their sum by name, and their number."""

    total: Gradient
    number: int


class WeightingStep:
    """Owns the weight model, its optimizer and the accumulated hypergradients.

    Args:
        weighting: the weight model.
        optimizer: its optimizer; None for its default, see `default_optimizer`.
        accumulate: how many hypergradients each step averages.
        mean: averages a hypergradient over processes.

    Raises:
        MetaKDError: the optimizer is no torch optimizer, or has none of the weight model's parameters.

    Examples:
        >>> table = nn.Linear(1, 1, bias=False)
        >>> step = WeightingStep(table, torch.optim.SGD(table.parameters(), lr=1.0), accumulate=2)
        >>> before = table.weight.item()
        >>> for value in (1.0, 3.0):
        ...     norm = step.take({"weight": torch.tensor([[value]])}, before_step=lambda: None)
        >>> round(before - table.weight.item(), 4)
        2.0
    """

    def __init__(
        self,
        weighting: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        accumulate: int,
        mean: Mean = unchanged,
    ) -> None:
        if not isinstance(weighting, nn.Module):
            raise MetaKDError(
                f"weighting must be an nn.Module (features, batch) -> (B, M), got {type(weighting).__name__}"
            )
        params = list(weighting.parameters())
        if optimizer is None and params:
            optimizer = default_optimizer(weighting)
        if optimizer is not None:
            _check_optimizer(optimizer, params)
        self.weighting, self.optimizer = weighting, optimizer
        self.accumulate, self._mean = accumulate, mean
        self.pending = Pending({}, 0)

    @property
    def moves_next(self) -> bool:
        """Whether the next hypergradient makes the weight model step."""
        return self.pending.number + 1 >= self.accumulate

    def params(self) -> dict[str, Tensor]:
        """The weight model's trainable parameters by name."""
        return {name: p for name, p in self.weighting.named_parameters() if p.requires_grad}

    def pull_back(self, weights: Tensor, cotangent: Tensor) -> Gradient:
        """The hypergradient in the weight model's parameters from the one in the weights (B, M).

        Raises:
            MetaKDError: the weights do not depend on the parameters.
        """
        params = self.params()
        if not params or not weights.requires_grad:
            raise MetaKDError(
                "the weights do not depend on any trainable parameter of the weight model, so there is no "
                "hypergradient; pass meta_batch=None to use a frozen weight model"
            )
        found = torch.autograd.grad(weights, list(params.values()), cotangent.to(weights.dtype), allow_unused=True)
        return with_zeros(dict(zip(params, found, strict=True)), params)

    def take(self, gradient: Gradient, before_step: Callable[[], None]) -> Tensor:
        """Accumulate this process's part of a hypergradient; step the weight model if `accumulate` have come together.

        Afterwards every parameter's `.grad` is this hypergradient, and its norm is returned. `before_step` runs right
        before the optimizer's step.
        """
        params = self.params()
        gradient = with_zeros(self._mean({**gradient}, params, "the hypergradient"), params)
        norm = norm_of(list(gradient.values()))
        number, total = self.pending.number + 1, gradient
        if self.pending.total:
            sums = summed(list(self.pending.total.values()), list(gradient.values()))
            total = dict(zip(gradient, sums, strict=True))
        if self.moves_next and self.optimizer is not None:
            means = scaled(list(total.values()), 1 / number) if number > 1 else clones(list(total.values()))
            _set_gradients(params, means)
            before_step()
            self.optimizer.step()
            self.pending = Pending({}, 0)
            _set_gradients(params, list(gradient.values()))
        else:
            self.pending = Pending(total, number)
            _set_gradients(params, clones(list(gradient.values())))  # the user may clear them in place
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Copies of the weight model, its optimizer and the accumulated hypergradients."""
        weights = self.weighting.state_dict()
        return {
            # A model whose lazy layers have seen no batch has nothing to save.
            "weighting": {} if any(map(is_lazy, weights.values())) else _copies(weights),
            "weighting_optimizer": {} if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "pending": _copies(self.pending.total),
            "pending_count": self.pending.number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        if state["weighting"]:
            self.weighting.load_state_dict(state["weighting"])
        if self.optimizer is not None:
            # After the weights, because lazy layers learn their sizes there.
            load_optimizer_state(state["weighting_optimizer"], self.optimizer, "the balancer", "weighting_optimizer")
        params = self.params()
        total = {name: value.detach().to(params[name], copy=True) for name, value in state["pending"].items()}
        self.pending = Pending(total, int(state["pending_count"]))


def _set_gradients(params: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> None:
    for p, gradient in zip(params.values(), gradients, strict=True):
        p.grad = gradient


def _copies(values: Mapping[str, Tensor]) -> Gradient:
    return dict(zip(values, clones(list(values.values())), strict=True))


def _check_optimizer(optimizer: Any, params: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaKDError(f"weighting_optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in params):
        raise MetaKDError(
            "weighting_optimizer holds none of the weight model's parameters; build it from weighting.parameters()"
        )
