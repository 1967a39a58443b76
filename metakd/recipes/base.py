"""Shared by the recipes: terms, the weight model's device and optimizer, and the construction of the balancer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metakd._call.arguments import weighting_dtype
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import CrossEntropy, SoftTarget, Term

Model = TypeVar("Model", bound=nn.Module)


def hard_and_soft(temperature: float) -> dict[str, Term]:
    """The two terms of distillation: cross-entropy, and divergence from the teacher."""
    return {"hard": CrossEntropy(), "soft": SoftTarget(temperature=temperature)}


@dataclass(frozen=True)
class Sum:
    """The sum of several terms, itself a term."""

    terms: Sequence[Term]

    @property
    def uses_teacher(self) -> bool:
        """Whether one of them needs the teacher."""
        return any(getattr(term, "uses_teacher", True) for term in self.terms)

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        return torch.stack([term(outputs, batch) for term in self.terms]).sum(dim=0)


def chosen(setting: str | None, known: Mapping[str | None, Any], recipe: str) -> Any:
    """The value of a recipe's published setting, or raise."""
    if setting not in known:
        names = ", ".join(repr(name) for name in known)
        raise MetaKDError(f"recipes.{recipe} has no setting {setting!r}; it follows {names}")
    return known[setting]


def beside(student: nn.Module, model: Model) -> Model:
    """Move the weight model to the student's device and real dtype, float32 or finer."""
    # The balancer refuses a student that is no module or has no trainable parameter.
    parameters = student.parameters() if isinstance(student, nn.Module) else []
    like = next((p for p in parameters if p.requires_grad), None)
    return model if like is None else model.to(like.device, weighting_dtype(like))


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam for a weight model."""
    return torch.optim.Adam(model.parameters(), lr=rate(lr), weight_decay=weight_decay)


def rate(lr: float) -> float:
    """Return the learning rate if it is finite and not negative, or raise."""
    if not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        raise MetaKDError(f"lr is {lr!r}, but the weight model's learning rate must be finite and not negative")
    return lr


def configured(
    recipe: str, student: nn.Module, terms: Mapping[str, Term], options: Mapping[str, Any], **parts: Any
) -> BilevelLossBalancer:
    """Build the balancer from a recipe's parts and the caller's options; raise if an option is one of the parts."""
    if taken := sorted(parts.keys() & options.keys()):
        raise MetaKDError(
            f"recipes.{recipe} sets {', '.join(taken)} itself; leave it out, or build a BilevelLossBalancer from "
            "parts of your own"
        )
    return BilevelLossBalancer(student, terms, **parts, **options)
