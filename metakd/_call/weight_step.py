"""The meta-parameters' side of a step: hypergradients are accumulated, averaged, and given to their optimizer."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import with_zeros
from metakd._basics.checks import check
from metakd._basics.together import clones, norm_of, scaled, summed
from metakd._call.learned_terms import LearnedTerms
from metakd._call.optimizer_state import load_optimizer_state
from metakd._virtual.reach import Walk
from metakd.errors import MetaKDError
from metakd.estimators.problem import Mean, unchanged
from metakd.weighting.base import default_optimizer

Gradient = dict[str, Tensor]


class Pending(NamedTuple):
    """Hypergradients since the weight model's last step: their sum by name, and their number."""

    total: Gradient
    number: int


class WeightingStep:
    """Owns the weight model, the terms' own parameters, their optimizer and the accumulated hypergradients.

    Args:
        weighting: the weight model.
        learned: the terms' own parameters.
        optimizer: of both; None for the weight model's default, see `default_optimizer`, with lr=1e-2 and no decay for
            the terms' parameters.
        accumulate: how many hypergradients each step averages.
        mean: averages a hypergradient over processes.

    Raises:
        MetaKDError: the optimizer is no torch optimizer, has none of the weight model's parameters, or not all of the
            terms'; or nothing could give the terms a hypergradient.

    Examples:
        >>> table = nn.Linear(1, 1, bias=False)
        >>> none = LearnedTerms({}, nn.Tanh(), [], table)
        >>> step = WeightingStep(table, none, torch.optim.SGD(table.parameters(), lr=1.0), accumulate=2)
        >>> before = table.weight.item()
        >>> for value in (1.0, 3.0):
        ...     norm = step.take({"weight": torch.tensor([[value]])}, before_step=lambda: None)
        >>> round(before - table.weight.item(), 4)
        2.0
    """

    def __init__(
        self,
        weighting: nn.Module,
        learned: LearnedTerms,
        optimizer: torch.optim.Optimizer | None,
        accumulate: int,
        mean: Mean = unchanged,
    ) -> None:
        params, of_terms = list(weighting.parameters()), learned.params()
        if of_terms and hasattr(weighting, "from_influence"):
            raise MetaKDError(
                f"{type(weighting).__name__} looks ahead with weights of zero, where the parameters of terms do not "
                f"matter ({', '.join(of_terms)}); use another weight model, or freeze them with requires_grad_(False)"
            )
        if optimizer is None and params:
            optimizer = default_optimizer(weighting)
            if of_terms:
                optimizer.add_param_group({"params": list(of_terms.values()), "lr": 1e-2, "weight_decay": 0.0})
        elif optimizer is None and of_terms:
            optimizer = torch.optim.Adam(list(of_terms.values()), lr=1e-2)
        if optimizer is not None:
            _check_optimizer(optimizer, params, of_terms)
        self.weighting, self.learned, self.optimizer = weighting, learned, optimizer
        self.accumulate, self._mean = accumulate, mean
        self.walk = Walk()
        self.pending = Pending({}, 0)
        self._checked = False

    @property
    def moves_next(self) -> bool:
        """Whether the next hypergradient makes the weight model step."""
        return self.pending.number + 1 >= self.accumulate

    def params(self) -> dict[str, Tensor]:
        """All trainable meta-parameters by name: the weight model's and the terms'."""
        return self._of_weighting() | self.learned.params()

    def every(self) -> list[Tensor]:
        """All meta-parameters, frozen ones included."""
        return [*self.weighting.parameters(), *self.learned.named.values()]

    def _of_weighting(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.weighting.named_parameters() if p.requires_grad}

    def pull_back(self, weights: Tensor, found: Mapping[str, Tensor]) -> Gradient:
        """The hypergradient in all meta-parameters from the one in "weights", (B, M), and in the terms' parameters.

        Raises:
            MetaKDError: the weights do not depend on the parameters.
        """
        params, of_terms = self._of_weighting(), {name: found[name] for name in self.learned.params()}
        if of_terms and not params:
            return of_terms
        if not params or not weights.requires_grad:
            raise MetaKDError(
                "the weights do not depend on any trainable parameter of the weight model, so there is no "
                "hypergradient; pass meta_batch=None to use a frozen weight model"
            )
        cotangent = found["weights"].to(weights.dtype)
        through = torch.autograd.grad(weights, list(params.values()), cotangent, allow_unused=True)
        return with_zeros(dict(zip(params, through, strict=True)), params) | of_terms

    def take(self, gradient: Gradient, before_step: Callable[[], None]) -> Tensor:
        """Accumulate this process's part of a hypergradient; step the weight model if `accumulate` have come together.

        Afterwards every parameter's `.grad` is this hypergradient, and its norm is returned. `before_step` runs right
        before the optimizer's step.
        """
        params = self.params()
        gradient = with_zeros(self._mean({**gradient}, params, "the hypergradient"), params)
        self._warn_of_idle_terms(gradient)
        norm = norm_of(list(gradient.values()))
        check(partial(self._judge, gradient), norm)
        own, number = list(gradient.values()), self.pending.number + 1
        sums = summed(list(self.pending.total.values()), own) if self.pending.total else clones(own)
        if self.moves_next and self.optimizer is not None:
            _set_gradients(params, scaled(sums, 1 / number) if number > 1 else sums)
            before_step()
            self.optimizer.step()
            self.pending = Pending({}, 0)
        else:
            self.pending = Pending(dict(zip(gradient, sums, strict=True)), number)
        _set_gradients(params, own)  # apart from the sums, as the user may clear them in place
        return norm

    def _judge(self, gradient: Gradient, norm: float) -> None:
        """Raise if an entry of a hypergradient is NaN or infinite; it must not stay in the sum."""
        broken = [] if math.isfinite(norm) else [name for name, g in gradient.items() if not bool(g.isfinite().all())]
        if broken:
            self.pending = Pending({}, 0)
            raise MetaKDError(
                f"the hypergradient of {', '.join(map(repr, broken[:3]))} is NaN or infinite although its weights and "
                "their influence are finite: a derivative of the weight model (or of a term that learns) is not, as of "
                "a root or a norm at zero; clamp or shift what goes into it"
            )

    def why_zero(self) -> str:
        """A sentence on a hypergradient of zero although the meta loss depends on weights and losses."""
        if self._of_weighting():
            return (
                "the hypergradient of the weight model is exactly zero although its weights influence the meta loss; "
                "its output is saturated or constant: restart it with weights away from the ends of their range, or "
                "(softmax over one term) use output='sigmoid'"
            )
        return (
            f"the hypergradient of {', '.join(self.params())} is exactly zero although the losses influence the meta "
            "loss: the terms do not read these parameters in a call, or are saturated"
        )

    def _warn_of_idle_terms(self, gradient: Gradient) -> None:
        """Warn once if the first hypergradient does not feel parameters of terms, such as those of a frozen network."""
        checked, self._checked = self._checked, True
        idle = [] if checked else [name for name in self.learned.params() if not bool(gradient[name].any())]
        if idle and len(idle) < len(gradient):  # with nothing learned, an error follows
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            warnings.warn(
                f"the hypergradient in {', '.join(idle[:3])}{more} is exactly zero, so these parameters of terms are "
                "not learned: the losses do not depend on them, or not yet. Freeze what should stay, such as a network "
                "inside a term, with requires_grad_(False)",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """Copies of the meta-parameters, their optimizer's state and the accumulated hypergradients."""
        weights = self.weighting.state_dict()
        return {
            # A model whose lazy layers have seen no batch has nothing to save.
            "weighting": {} if any(map(is_lazy, weights.values())) else _copies(weights),
            "weighting_optimizer": {} if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "pending": _copies(self.pending.total),
            "pending_count": self.pending.number,
            **({"learned_terms": self.learned.values()} if self.learned.named else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        if state["weighting"]:
            self.weighting.load_state_dict(state["weighting"])
        with torch.no_grad():
            for name, p in self.learned.named.items():
                p.copy_(state["learned_terms"][name])
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


def _check_optimizer(optimizer: Any, params: list[nn.Parameter], of_terms: Mapping[str, Tensor]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaKDError(f"weighting_optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, p in of_terms.items() if id(p) not in held]:
        raise MetaKDError(
            f"weighting_optimizer lacks parameters of terms that are to be learned: {', '.join(missing)}. Add them, as "
            'weighting_optimizer.add_param_group({"params": term.parameters(), "lr": 1e-2, "weight_decay": 0.0}), or '
            "freeze them with term.requires_grad_(False)"
        )
    learned_alone = of_terms and not any(p.requires_grad for p in params)
    if not (learned_alone or any(id(p) in held for p in params)):
        raise MetaKDError(
            "weighting_optimizer holds none of the weight model's parameters; build it from weighting.parameters()"
        )
