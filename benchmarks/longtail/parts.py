"""Terms and a weight model for the candidates: label and teacher, corrected by numbers that are learned."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metakd import Batch
from metakd.terms import CrossEntropy, Term
from metakd.terms.counts import log_prior
from metakd.terms.softened import divergence, softened
from metakd.weighting import GroupTable


class LearnedLabel(nn.Module):
    """A term of the label alone, on logits with a learned scale and offset for each class; at first balanced softmax.

    Args:
        counts: training images of each class.
        term: of the logits and the label, `CrossEntropy` if not given; its parameters are learned, too.
    """

    uses_teacher: ClassVar[bool] = False

    def __init__(self, counts: Sequence[int], term: Term | None = None) -> None:
        super().__init__()
        self.term = CrossEntropy() if term is None else term
        self.offset = nn.Parameter(log_prior(counts, 1.0).values.float())
        self.log_scale = nn.Parameter(torch.zeros(len(counts)))

    def forward(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(B,) losses."""
        return self.term(self.log_scale.exp() * outputs + self.offset, batch)


class LearnedTeacher(nn.Module):
    """Distillation from a teacher without a learned prior, at a learned temperature; at first `DebiasedSoftTarget`.

    Args:
        counts: training images of each class.
        temperature: where it starts.
    """

    uses_teacher: ClassVar[bool] = True

    def __init__(self, counts: Sequence[int], temperature: float = 4.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(log_prior(counts, 1.0).values.float())
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def forward(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(B,) losses."""
        teacher: Any = batch.teacher
        degree = self.log_temperature.exp()
        return divergence(softened(teacher - self.offset, degree), softened(outputs, degree), degree)


class ByTeacher(nn.Module):
    """One weight a term and class where the teacher without the prior is right, and another one where it is wrong.

    Args:
        counts: training images of each class.
        terms: their number.
    """

    prior: Tensor

    def __init__(self, counts: Sequence[int], terms: int) -> None:
        super().__init__()
        self.table = GroupTable("index", 2 * len(counts), terms, init=1.0, output="softplus")
        self.register_buffer("prior", log_prior(counts, 1.0).values.float())

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """(B, M) weights."""
        teacher: Any = batch.teacher
        right = (teacher - self.prior).argmax(1) == batch.targets
        weights: Tensor = self.table(features, batch._replace(index=2 * batch.targets + right.long()))
        return weights
