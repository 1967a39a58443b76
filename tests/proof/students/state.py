"""Counters, generators and what else a pass leaves in Python objects."""

from __future__ import annotations

import collections
import itertools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.proof.students.registry import Parts, Stage, part, stage


@stage(count=int)
def counter_attribute(self: Any, z: Tensor) -> Any:
    self.count += 1
    return torch.tanh(self.layer(z) * (1 + 0.3 * (self.count % 3)))


@part()
def counter_class_variable(parts: Parts) -> None:
    class Counts(Stage):
        calls = 0

        def forward(self, z: Tensor) -> Tensor:
            type(self).calls += 1
            return torch.tanh(self.layer(z)) * (1 + 0.2 * (type(self).calls % 2))

    parts.add(Counts(lambda self, z: z))
    parts.watched.append(lambda: Counts.calls)


@part()
def counter_nonlocal(parts: Parts) -> None:
    calls = 0

    def counted(self: Any, z: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return torch.tanh(self.layer(z)) + 0.1 * (calls % 2)

    parts.add(Stage(counted))
    parts.watched.append(lambda: calls)


_CALLS = 0


@part()
def counter_global(parts: Parts) -> None:
    def counted(self: Any, z: Tensor) -> Any:
        global _CALLS
        _CALLS += 1
        return torch.tanh(self.layer(z)) + 0.1 * (_CALLS % 2)

    global _CALLS
    _CALLS = 0
    parts.add(Stage(counted))
    parts.watched.append(lambda: _CALLS)


@part()
def counter_of_itertools(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: self.layer(z) if next(self.numbers) >= 0 else z, numbers=itertools.count()))
    made = parts.last
    parts.watched.append(lambda: repr(made.numbers))


class Property(Stage):
    calls = 0

    @property
    def scale(self) -> float:
        type(self).calls += 1
        return 1 + 0.2 * (type(self).calls % 2)

    def forward(self, z: Tensor) -> Any:
        return torch.tanh(self.layer(z)) * self.scale


@part()
def counter_in_a_property(parts: Parts) -> None:
    Property.calls = 0
    parts.add(Property(lambda self, z: z))
    parts.watched.append(lambda: Property.calls)


@part()
def bound_builtin_method(parts: Parts) -> None:
    log: list[Any] = []
    parts.add(Stage(lambda self, z: (self.note(len(z)), torch.tanh(self.layer(z)))[1], note=log.append))
    parts.watched.append(lambda: log)


@stage(history=lambda: list(range(12_000)))
def long_history(self: Any, z: Tensor) -> Any:
    self.history.append(len(z))
    return torch.tanh(self.layer(z))


@stage(array=lambda: np.zeros(70_000))
def large_array(self: Any, z: Tensor) -> Any:
    self.array[0] += 1
    return torch.tanh(self.layer(z))


@stage(state=lambda: (torch.zeros(1), torch.zeros(1)))
def tensors_in_a_tuple(self: Any, z: Tensor) -> Any:
    self.state[0].add_(1.0)
    return torch.tanh(self.layer(z))


@stage(meter=lambda: collections.UserDict(count=0))
def foreign_object(self: Any, z: Tensor) -> Any:
    self.meter["count"] += 1
    return torch.tanh(self.layer(z))


@stage(seen=lambda: collections.deque(maxlen=3), names=set)
def deque_and_set(self: Any, z: Tensor) -> Any:
    self.seen.append(len(self.seen))
    self.names.add(len(self.names))
    return torch.tanh(self.layer(z)) + 0.05 * len(self.names)


def noise(z: Tensor, numbers: Any) -> Tensor:
    return torch.as_tensor(numbers).to(z)


@stage(source=lambda: torch.Generator().manual_seed(3))
def generator_of_torch(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * torch.rand(z.shape, generator=self.source).to(z))


@stage(source=lambda: np.random.default_rng(3))
def generator_of_numpy(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * noise(z, self.source.random(z.shape)))


@stage(source=lambda: random.Random(3))
def generator_of_python(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * self.source.uniform(0.5, 1.5)


@stage()
def default_generators(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * random.uniform(0.5, 1.5) + noise(z, np.random.rand(*z.shape))
