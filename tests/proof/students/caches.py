"""Parametrisations, and caches of what was computed from parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.proof.students.registry import WIDTH, Parts, Stage, linear, part, stage


@part()
def weight_norm(parts: Parts) -> None:
    parts.add(nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh()))


@part(by_autograd=True)
def spectral_norm_eval(parts: Parts) -> None:
    layer = parametrizations.spectral_norm(linear())
    parts.add(nn.Sequential(layer.eval(), nn.Tanh()))


@part()
def orthogonal(parts: Parts) -> None:
    parts.add(nn.Sequential(parametrizations.orthogonal(linear(), orthogonal_map="householder"), nn.Tanh()))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


@part()
def own_parametrization_cached(parts: Parts) -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parts.add(nn.Sequential(layer, nn.Tanh(), layer))
    parts.around.append(parametrize.cached)


def recomputed(self: Any, z: Tensor) -> Any:
    if self.cache.get("version") != self.layer.weight._version:
        self.cache.update(version=self.layer.weight._version, matrix=torch.tanh(self.layer.weight))
    return torch.tanh(self.layer(z) + z @ self.cache["matrix"])


@part()
def cache_by_version(parts: Parts) -> None:
    parts.add(Stage(recomputed, cache={}))


@part()
def cache_by_version_zero(parts: Parts) -> None:
    made = Stage(recomputed, cache={})
    made.layer.weight = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH))
    parts.add(made)


@part()
def cache_by_identity(parts: Parts) -> None:
    def known(self: Any, z: Tensor) -> Any:
        w = self.layer.weight
        if self.cache.get("of") != [hash((w.data_ptr(), w._version))]:
            self.cache.update(of=[hash((w.data_ptr(), w._version))], matrix=torch.tanh(w))
        return torch.tanh(self.layer(z) + z @ self.cache["matrix"])

    parts.add(Stage(known, cache={}))


@part()
def cache_cleared_by_step(parts: Parts) -> None:
    """The owner of the loop throws it away after each step."""

    def known(self: Any, z: Tensor) -> Any:
        if "matrix" not in self.cache:
            self.cache["matrix"] = torch.tanh(self.layer.weight)
        return torch.tanh(self.layer(z) + z @ self.cache["matrix"])

    made = Stage(known, cache={})
    parts.add(made)
    parts.after_step.append(made.cache.clear)


@stage(norms=dict)
def norm_left_in_a_dict(self: Any, z: Tensor) -> Any:
    """Reads what an earlier layer of this pass left."""
    self.norms.setdefault("all", []).append(z)
    return torch.tanh(self.layer(z)) * (1 + 0.1 * self.norms.pop("all")[0].norm(dim=1, keepdim=True))
