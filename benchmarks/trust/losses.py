"""Losses of the training samples, beside cross-entropy for the meta samples among them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import Batch
from metakd.terms import CrossEntropy, Term


class ByOrigin(nn.Module):
    """A term for training samples, and cross-entropy for the meta samples among them, whose labels are right.

    Args:
        term: of the training samples.
        log_prior: of the training labels; added to the logits (logit adjustment), for long tails.
        meta: whether this term counts meta samples; of several terms only one does.
    """

    def __init__(self, term: Term, log_prior: Tensor | None = None, *, meta: bool = True) -> None:
        super().__init__()
        self.term, self.meta = term, meta
        self.register_buffer("log_prior", log_prior)
        self.uses_teacher = getattr(term, "uses_teacher", False)

    def forward(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        moved = outputs if self.log_prior is None else outputs + self.log_prior
        own: Tensor = self.term(moved, batch)
        from_meta = (batch.columns or {}).get("from_meta")
        if from_meta is None:
            return own
        trusted = CrossEntropy()(outputs, batch) if self.meta else torch.zeros_like(own)
        return torch.where(from_meta == 1, trusted, own)


class Stacked(nn.Module):
    """Cross-entropy with a target made of all teachers: `softmax(concatenated log-probabilities V + c)`.

    Stacking (Wolpert, 1992) fits V and c on the meta set; `learned` lets the balancer go on from there.
    """

    uses_teacher = True

    def __init__(self, matrix: Tensor, offset: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.matrix, self.offset = (nn.Parameter(v.clone(), requires_grad=learned) for v in (matrix, offset))

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sample, shape `(B,)`."""
        target = (answers(batch) @ self.matrix + self.offset).softmax(1)
        return -(target * F.log_softmax(outputs, 1)).sum(1)


def answers(batch: Batch) -> Tensor:
    """The log-probabilities of all teachers, side by side."""
    return torch.cat([F.log_softmax(z, 1) for z in batch.teacher], 1)


def fit_stacking(meta: Batch, decay: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Logistic regression on the teachers' answers to the meta set, by L-BFGS."""
    x, classes = answers(meta), int(meta.targets.max()) + 1
    matrix, offset = torch.zeros(x.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ matrix + offset, meta.targets) + decay * matrix.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return matrix.detach(), offset.detach()
