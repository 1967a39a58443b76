"""Parameters in several places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.proof.students.registry import WIDTH, Parts, Stage, linear, part, stage


@part()
def alias(parts: Parts) -> None:
    parts.student.again = parts.student.first
    parts.add(Stage(lambda self, z: z + torch.tanh(self.layer(z))))
    parts.student.body = nn.Sequential(parts.last, nn.Tanh())


@part()
def repeated_layer(parts: Parts) -> None:
    layer = nn.Sequential(linear(), nn.Tanh())
    parts.add(layer)
    parts.add(layer)


@part(by_autograd=True)
def shared_batch_norm(parts: Parts) -> None:
    norm = nn.BatchNorm1d(WIDTH)
    parts.add(nn.Sequential(linear(), norm, nn.Tanh(), linear(), norm))


@part()
def tied(parts: Parts) -> None:
    one, other = linear(), linear()
    other.weight = one.weight
    parts.add(nn.Sequential(one, nn.Tanh(), other))


@stage(kept=list)
def kept_in_a_list(self: Any, z: Tensor) -> Any:
    if not self.kept:
        self.kept.append(self.layer.weight)
    return torch.tanh(self.layer(z)) * (1 + 0.1 * self.kept[0].square().sum())


@part()
def kept_in_a_dict(parts: Parts) -> None:
    kept: dict[str, Any] = {"w": parts.student.first.weight, "more": [parts.student.head.bias]}
    parts.add(Stage(lambda self, z: self.layer(z) * (1 + 0.1 * kept["w"].square().sum() + kept["more"][0].sum())))


@part()
def kept_in_a_tuple(parts: Parts) -> None:
    kept = (parts.student.first.weight,)
    parts.add(Stage(lambda self, z: self.layer(z) * (1 + 0.1 * kept[0].square().sum())))


@part(by_autograd=True)
def shares_storage_detached(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: torch.tanh(self.layer(z) + z @ self.shadow)))
    parts.last.shadow = parts.last.layer.weight.detach()


@part()
def shares_storage_view(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: torch.tanh(self.layer(z) + z @ self.view)))
    parts.last.view = parts.last.layer.weight.t()


@part()
def flat_parameter(parts: Parts) -> None:
    made = Stage(lambda self, z: torch.tanh(z @ self.flat[:36].view(6, 6) + self.flat[36:]))
    made.flat = nn.Parameter(0.4 * torch.randn(42))
    parts.add(made)


@part()
def attribute_of_a_parameter(parts: Parts) -> None:
    def scaled(self: Any, z: Tensor) -> Any:
        return torch.tanh(self.layer(z) * self.layer.weight.factor)

    parts.add(Stage(scaled))
    parts.last.layer.weight.factor = 0.7
