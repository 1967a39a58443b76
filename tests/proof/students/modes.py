"""Behaviour by mode, and gradients that are no derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.proof.students.registry import stage


@stage()
def by_training(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if self.training else 0.5)


@stage()
def by_grad_mode(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if torch.is_grad_enabled() else 0.5)


@stage()
def by_requires_grad(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if self.layer.weight.requires_grad else 0.5)


@stage()
def checks_the_parameter_class(self: Any, z: Tensor) -> Any:
    known = [p for p in self.layer.__dict__["_parameters"].values() if isinstance(p, nn.Parameter)]
    return torch.tanh(self.layer(z)) + 0.1 * sum((p.square().sum() for p in known), start=z.new_zeros(()))


@stage(by_autograd=True)
def straight_through(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z))
    return z + (z.round(decimals=1) - z).detach()


@stage()
def frozen_batch_norm_switches(self: Any, z: Tensor) -> Any:
    self.train(not self.training)
    self.train(not self.training)
    return torch.tanh(self.layer(z))
