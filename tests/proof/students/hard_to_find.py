"""What a walk over objects, or a proof of the first call, may miss."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tests.proof.students.registry import WIDTH, Parts, Stage, part, stage


class Slots:
    __slots__ = ("source",)

    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(3)


@stage(slots=Slots)
def generator_in_slots(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * torch.rand(z.shape, generator=self.slots.source).to(z))


@stage(numbers=lambda: itertools.cycle((0.5, 1.0, 1.5)))
def scale_of_an_iterator(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * next(self.numbers)


@part(by_autograd=True)
def index_of_many(parts: Parts) -> None:
    """Holds more objects than a walk looks at, and statistics behind them."""
    index = {c: [(i, object()) for i in range(900)] for c in range(60)}
    norm = nn.Sequential(nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False)))
    parts.add(Stage(lambda self, z: self.norm(self.layer(z)).tanh(), index=index, norm=norm))


@part(by_autograd=True)
def switched_later(parts: Parts) -> None:
    """Changes what it does to gradients in the meta pass alone."""

    def turned(self: Any, z: Tensor) -> Any:
        self.calls += 1
        z = torch.tanh(self.layer(z))
        if z.requires_grad and self.calls % 2 == 0:
            z.register_hook(lambda g: -0.5 * g)
        return z

    parts.add(Stage(turned, calls=0))
