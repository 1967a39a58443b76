"""Helpers of the distillation terms: softened probabilities, their divergence, and the mass of groups of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from metakd.errors import MetaKDError


class Softened:
    """A term with a temperature that compares the student with the teacher."""

    temperature: float
    uses_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise MetaKDError(
                f"temperature is {self.temperature}, but must be positive and finite; 1 leaves the "
                "probabilities as they are, 4 is a common choice for distillation"
            )

    def _divergence(self, of: Tensor, given: Tensor, mass: Tensor | None = None) -> Tensor:
        return divergence(of, given, self.temperature, mass)


def divergence(of: Tensor, given: Tensor, temperature: float | Tensor, mass: Tensor | None = None) -> Tensor:
    """`T^2 KL(of || given)` of each row; both are log probabilities. A known `mass` is `mass_of(of, temperature)`."""
    mass = mass_of(of, temperature) if mass is None else mass
    return (mass * (given - of)).sum(dim=1)


def mass_of(of: Tensor, temperature: float | Tensor) -> Tensor:
    """`-T^2` times the probabilities: where these are the teacher's, factor and sign cost no derivative."""
    return of.exp() * -(temperature**2)


def softened(z: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """`log softmax(z / T)` of each row, clamped at the smallest finite number."""
    # A log probability of -inf (masked class, overflow) would give 0 * inf = NaN in the divergence.
    return floored(torch.log_softmax(z / temperature, dim=1))


def floored(z: Tensor, share: float = 1.0) -> Tensor:
    """The logits with -inf replaced by the smallest finite number, so that a fully masked group gives no NaN.

    With a `share` the floor is this share of that number, for all logits below it.

    It is clamp(min=lowest), whose derivatives take two kernels more.
    """
    lowest = share * torch.finfo(z.dtype).min
    return torch.threshold(z, lowest, lowest)


def log_masses(parts: Sequence[Tensor]) -> Tensor:
    """The log probability of each group `(B, P)`, from the logits `(B, C_p)` of its classes."""
    return softened(torch.stack([part.logsumexp(dim=1) for part in parts], dim=1))
