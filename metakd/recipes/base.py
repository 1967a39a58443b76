"""What the recipes share: their terms, where their weight models live, and one way to build the balancer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.parts import weighting_dtype
from metakd.terms import CrossEntropy, SoftTarget, Term

Model = TypeVar("Model", bound=nn.Module)


def hard_and_soft(temperature: float) -> dict[str, Term]:
    """The two terms of distillation: cross-entropy, and divergence from the teacher.

    Examples:
        >>> list(hard_and_soft(4.0))
        ['hard', 'soft']
    """
    return {"hard": CrossEntropy(), "soft": SoftTarget(temperature=temperature)}


@dataclass(frozen=True)
class Sum:
    """The sum of some terms, itself a term.

    Examples:
        >>> Sum([CrossEntropy(), CrossEntropy()])(torch.zeros(1, 2), Batch(None, torch.tensor([0])))
        tensor([1.3863])
    """

    terms: Sequence[Term]

    @property
    def uses_teacher(self) -> bool:
        """Whether any of them may ask for the teacher's outputs."""
        return any(getattr(term, "uses_teacher", True) for term in self.terms)

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the sum of each sample's losses, shape `(B,)`."""
        return torch.stack([term(outputs, batch) for term in self.terms]).sum(dim=0)


def beside(student: nn.Module, model: Model) -> Model:
    """The weight model on the device of the student's first trainable parameter, in real numbers as fine as its own.

    Half precision is raised to float32, in which a step of the weight model is not lost in rounding.

    Examples:
        >>> beside(nn.Linear(2, 2).double(), nn.Linear(1, 1)).weight.dtype
        torch.float64
    """
    # The balancer says what is wrong with a student that has none.
    parameters = student.parameters() if isinstance(student, nn.Module) else []
    like = next((p for p in parameters if p.requires_grad), None)
    return model if like is None else model.to(like.device, weighting_dtype(like))


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam for a weight model.

    Raises:
        MetaKDError: see `rate`.

    Examples:
        >>> adam(nn.Linear(1, 1), 1e-3).defaults["lr"]
        0.001
    """
    return torch.optim.Adam(model.parameters(), lr=rate(lr), weight_decay=weight_decay)


def rate(lr: float) -> float:
    """The learning rate, if it is one.

    Raises:
        MetaKDError: it is negative or not finite.

    Examples:
        >>> rate(0.1)
        0.1
    """
    if not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        raise MetaKDError(f"lr is {lr!r}, the weight model's learning rate must be finite and not negative")
    return lr


def configured(
    recipe: str, student: nn.Module, terms: Mapping[str, Term], options: Mapping[str, Any], **parts: Any
) -> BilevelLossBalancer:
    """The balancer of a recipe's parts and the caller's options.

    Raises:
        MetaKDError: an option is one of the parts; or see `BilevelLossBalancer`.

    Examples:
        >>> student = nn.Linear(2, 2)
        >>> sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> configured("mine", student, hard_and_soft(4.0), {"every": 2}, optimizer=sgd).every
        2
    """
    if taken := sorted(parts.keys() & options.keys()):
        raise MetaKDError(
            f"recipes.{recipe} chooses {', '.join(taken)} itself; leave it out, or build a BilevelLossBalancer with "
            "parts of your own"
        )
    return BilevelLossBalancer(student, terms, **parts, **options)
