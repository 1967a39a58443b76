"""The weight model's side of a step: hypergradients are gathered, averaged, and given to its optimizer."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import filled
from metakd._call.optimizer_state import load_optimizer_state
from metakd.errors import MetaKDError
from metakd.estimators.problem import Mean, unchanged

Gradient = dict[str, Tensor]


class Pending(NamedTuple):
    """Hypergradients gathered since the weight model last moved: their sum by name, and their number."""

    total: Gradient
    number: int


class WeightingStep:
    """Owns the weight model, its optimizer and the hypergradients that wait for its next step.

    Args:
        weighting: the weight model.
        optimizer: its optimizer; None for Adam(lr=1e-3, weight_decay=1e-4), BiKD's.
        accumulate: hypergradients averaged before each step.
        mean: of a hypergradient over the processes that each have a part of it.

    Raises:
        MetaKDError: the optimizer is not a torch optimizer, or holds none of the weight model's parameters.

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
            optimizer = torch.optim.Adam(params, lr=1e-3, weight_decay=1e-4)
        if optimizer is not None:
            _check_optimizer(optimizer, params)
        self.weighting, self.optimizer = weighting, optimizer
        self.accumulate, self._mean = accumulate, mean
        self.pending = Pending({}, 0)

    @property
    def moves_next(self) -> bool:
        """Whether the next hypergradient makes the weight model move."""
        return self.pending.number + 1 >= self.accumulate

    def params(self) -> dict[str, Tensor]:
        """The weight model's trainable parameters by name."""
        return {name: p for name, p in self.weighting.named_parameters() if p.requires_grad}

    def pull_back(self, weights: Tensor, cotangent: Tensor) -> Gradient:
        """The hypergradient in the weight model's parameters, from the one in the weights (B, M).

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
        return filled(dict(zip(params, found, strict=True)), params)

    def take(self, gradient: Gradient, before_step: Callable[[], None], *, felt: bool = True) -> Tensor:
        """Gather one hypergradient; step the weight model where it is the last of `accumulate`.

        Afterwards every parameter's `.grad` is this hypergradient.

        Args:
            gradient: by name, as in `params()`; this process's part, of whose mean all that follows is said.
            before_step: called right before the optimizer steps.
            felt: whether the meta loss feels the weights, so that a hypergradient of zero is the weight model's doing.

        Returns:
            The Euclidean norm of this hypergradient, a scalar tensor.

        Raises:
            MetaKDError: it is exactly zero although the meta loss feels the weights.
        """
        params = self.params()
        gradient = filled(self._mean({**gradient}, params, "the hypergradient"), params)
        if felt and not any(bool(g.any()) for g in gradient.values()):
            raise MetaKDError(
                "the hypergradient of the weight model is exactly zero although its weights influence the meta "
                "loss; its output is saturated or constant: restart it with weights away from the ends of their "
                "range, or (softmax over one term) use output='sigmoid'"
            )
        total = {name: self.pending.total[name] + g if self.pending.total else g for name, g in gradient.items()}
        if self.moves_next and self.optimizer is not None:
            for name, p in params.items():
                p.grad = total[name] / (self.pending.number + 1)
            before_step()
            self.optimizer.step()
            self.pending = Pending({}, 0)
        else:
            self.pending = Pending(total, self.pending.number + 1)
        for name, p in params.items():
            p.grad = gradient[name].clone()
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The weight model, its optimizer and what is pending, copied."""
        weights = self.weighting.state_dict()
        return {
            # A model with lazy layers that has not seen a batch has nothing to save yet.
            "weighting": {} if any(map(is_lazy, weights.values())) else clones(weights),
            "weighting_optimizer": {} if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "pending": clones(self.pending.total),
            "pending_count": self.pending.number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken."""
        if state["weighting"]:
            self.weighting.load_state_dict(state["weighting"])
        if self.optimizer is not None:
            # After the weights, for lazy layers know their sizes only now.
            load_optimizer_state(state["weighting_optimizer"], self.optimizer, "the balancer", "weighting_optimizer")
        params = self.params()
        total = {name: value.detach().to(params[name], copy=True) for name, value in state["pending"].items()}
        self.pending = Pending(total, int(state["pending_count"]))


def clones(values: Mapping[str, Tensor]) -> Gradient:
    """Detached copies, by name."""
    return {name: value.detach().clone() for name, value in values.items()}


def _check_optimizer(optimizer: Any, params: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaKDError(f"weighting_optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in params):
        raise MetaKDError(
            "weighting_optimizer holds none of the weight model's parameters; build it from weighting.parameters()"
        )
