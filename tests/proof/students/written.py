"""Tensors that a pass writes to: inputs, buffers, parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.proof.students.registry import INGREDIENTS, WIDTH, Ingredient, Parts, Stage, part


@part()
def input_changed(parts: Parts) -> None:
    def change(module: nn.Module, inputs: Any) -> None:
        inputs[0].mul_(0.5).add_(0.1)

    parts.student.register_forward_pre_hook(change)


class Buffered(Stage):
    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__(function, **members)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(0), persistent=False)


def buffer(**options: Any) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    def register(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        INGREDIENTS[function.__name__] = Ingredient(lambda parts: parts.add(Buffered(function)), **options)
        return function

    return register


@buffer(carries=True, by_autograd=True)
def buffer_written(self: Any, z: Tensor) -> Any:
    self.mean.mul_(0.5).add_(0.5 * z.detach().mean(0))
    return torch.tanh(self.layer(z - self.mean))


@buffer(carries=True, by_autograd=True)
def buffer_replaced(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z - self.mean))
    self.mean = 0.5 * self.mean + 0.5 * z.detach().mean(0)
    return z


@buffer()
def buffer_resized(self: Any, z: Tensor) -> Any:
    self.seen.resize_(len(self.seen) + 1).fill_(0.1)
    return torch.tanh(self.layer(z)) + self.seen.sum()


@buffer(carries=True, by_autograd=True)
def buffer_keeps_the_graph(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z - self.mean.detach()))
    self.mean = z.mean(0)
    return z


@part()
def buffer_is_a_view(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z) + self.front.sum())
        self.whole.add_(0.1)
        return z

    made = Buffered(shifted)
    made.register_buffer("whole", torch.zeros(4))
    made.register_buffer("front", made.whole[:2])
    parts.add(made)


@part(carries=True, by_autograd=True)
def plain_tensor_written(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        if not hasattr(self, "average"):
            self.average = z.new_zeros(WIDTH)
        self.average.mul_(0.5).add_(0.5 * z.detach().mean(0))
        return torch.tanh(self.layer(z - self.average))

    parts.add(Stage(shifted))


@part()
def array_shares_memory(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z)) + self.seen.to(z).sum()
        self.array += 0.1
        return z

    array = np.zeros(2)
    parts.add(Stage(shifted, array=array, seen=torch.from_numpy(array)))


@part(carries=True, by_autograd=True)
def hidden_state_in_a_tuple(parts: Parts) -> None:
    def carried(self: Any, z: Tensor) -> Any:
        if self.hidden is not None:
            z = z + self.hidden[0]
        z = torch.tanh(self.layer(z))
        self.hidden = (z.detach().mean(0), z.detach())
        return z

    parts.add(Stage(carried, hidden=None))


@part(by_autograd=True, carries=True)
def parameter_clamped_in_the_pass(parts: Parts) -> None:
    def clamped(self: Any, z: Tensor) -> Any:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.3, 0.3)
        return torch.tanh(self.layer(z))

    parts.add(Stage(clamped))


@part(by_autograd=True, carries=True)
def parameter_decayed_in_the_pass(parts: Parts) -> None:
    def decayed(self: Any, z: Tensor) -> Any:
        self.layer.weight.data.mul_(0.9)
        return torch.tanh(self.layer(z))

    parts.add(Stage(decayed))


@part(by_autograd=True, carries=True)
def mean_teacher_inside(parts: Parts) -> None:
    def pulled(self: Any, z: Tensor) -> Any:
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.layer.parameters(), strict=True):
                slow.mul_(0.7).add_(0.3 * fast)
        self.distance = (self.layer(z) - self.ema(z)).square().mean(1)
        return torch.tanh(self.layer(z))

    made = Stage(pulled)
    made.ema = copy.deepcopy(made.layer).requires_grad_(False)
    parts.add(made)
    parts.terms["consistency"] = lambda outputs, batch: made.distance
