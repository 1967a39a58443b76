"""Terms and meta losses that read more than outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.proof.students.registry import CLASSES, Loose, Parts, Reader, Stage, part, size


@part()
def auxiliary_loss(parts: Parts) -> None:
    def left(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z))
        self.aux = size(z)
        return z

    parts.add(Stage(left))
    made = parts.last
    parts.terms["aux"] = lambda outputs, batch: made.aux


@part()
def term_calls_own_layer(parts: Parts) -> None:
    student = parts.student
    student.second = nn.Linear(CLASSES, CLASSES)
    logits = parts.logits

    def term(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(student.second(logits(outputs)), batch.targets, reduction="none")

    parts.terms["own_layer"] = term
    parts.meta_terms.append(term)


class NormTerm(Loose):
    def __init__(self, logits: Reader) -> None:
        super().__init__()
        self.norm, self.logits = nn.BatchNorm1d(CLASSES, affine=False), logits

    def forward(self, outputs: Any, batch: Any) -> Tensor:
        z: Tensor = self.norm(self.logits(outputs))
        return (z**3).mean(1).cos()


@part(by_autograd=True)
def term_with_batch_norm(parts: Parts) -> None:
    term = NormTerm(parts.logits)
    parts.terms["norm"] = term
    parts.watched.append(lambda: list(term.norm.buffers()))


@part(by_autograd=True)
def meta_loss_with_batch_norm(parts: Parts) -> None:
    term = NormTerm(parts.logits)
    parts.meta_terms.append(term)
    parts.watched.append(lambda: list(term.norm.buffers()))


@part()
def meta_loss_reads_a_tuple(parts: Parts) -> None:
    kept = tuple(parts.student.parameters())
    parts.meta_terms.append(lambda outputs, batch: 0.3 * sum(p.square().sum() for p in kept))


@part()
def meta_loss_reads_an_optimizer(parts: Parts) -> None:
    owner = torch.optim.SGD(parts.student.parameters(), lr=1.0)
    parts.meta_terms.append(
        lambda outputs, batch: 0.3 * sum(p.square().sum() for g in owner.param_groups for p in g["params"])
    )


@part(by_autograd=True)
def gradient_penalty(parts: Parts) -> None:
    student = parts.student

    def term(outputs: Any, batch: Any) -> Tensor:
        with torch.enable_grad():
            z = torch.tanh(student.first(batch.inputs)).detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(student.head(z)).sum(), z, create_graph=True)
        return g.square().sum(1)

    parts.terms["penalty"] = term


@part()
def inner_autograd(parts: Parts) -> None:
    def force(self: Any, z: Tensor) -> Any:
        with torch.enable_grad():
            x = z if z.requires_grad else z.detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(self.layer(x)).square().sum(), x, create_graph=True)
        return g

    parts.add(Stage(force))
