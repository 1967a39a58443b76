"""Methods that mix their terms by fixed weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.longtail.presets import DECAYS
from benchmarks.longtail.setting import Setting
from metakd import Batch, terms
from metakd.terms.counts import PerClass

Mixture = Mapping[str, tuple[float, terms.Term]]


@dataclass(frozen=True)
class ClassBalanced:
    """A term times the inverse effective number of the label's class (Cui et al., CVPR 2019), on average 1 a class."""

    counts: Sequence[int]
    term: terms.Term
    beta: float = 0.9999

    @cached_property
    def weights(self) -> PerClass:
        """(C,) weights."""
        found = 1 / (1 - self.beta ** torch.tensor(self.counts, dtype=torch.float64))
        return PerClass(found / found.mean())

    @property
    def uses_teacher(self) -> bool:
        """That of the term."""
        return getattr(self.term, "uses_teacher", True)

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """(B,) losses."""
        losses: Tensor = self.term(outputs, batch)
        return losses * self.weights.like(outputs)[batch.targets]


@dataclass(frozen=True)
class Fixed:
    """A sum of terms, each times its weight.

    Attributes:
        title: the method's name in the table.
        mixture: the class counts -> name -> (weight, term).
        warmup: the share of the epochs over which the weights of the terms that use a teacher rise from zero.
        late: the mixture from the student's first learning rate decay on, where it is another.
    """

    title: str
    mixture: Callable[[tuple[int, ...]], Mixture]
    warmup: float = 0.0
    late: Callable[[tuple[int, ...]], Mixture] | None = None

    def __call__(self, setting: Setting) -> "FixedObjective":
        """The loss of one cell."""
        mixture, late = self.mixture(setting.counts), (self.late or self.mixture)(setting.counts)
        return FixedObjective(setting, mixture, late, self.warmup * setting.preset.epochs)


@dataclass
class FixedObjective:
    """See `setting.Objective`."""

    setting: Setting
    mixture: Mixture
    late: Mixture
    warmup: float
    parts: dict[str, Any] = field(default_factory=dict)
    balancer: None = None

    def epoch(self, epoch: int, batches: Iterable[Any], meta_batches: Iterator[Any]) -> Iterator[tuple[Batch, Tensor]]:
        """See `setting.Objective`; the meta batches are not looked at."""
        for item in batches:
            yield self.loss(epoch, item)

    def weighted(self, epoch: int) -> Mixture:
        """The terms of an epoch, with their weights then."""
        mixture = self.mixture if epoch < round(DECAYS[0] * self.setting.preset.epochs) else self.late
        rise = min((epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return {name: (weight * (rise if _uses_teacher(t) else 1.0), t) for name, (weight, t) in mixture.items()}

    def loss(self, epoch: int, item: Sequence[Tensor]) -> tuple[Batch, Tensor]:
        """A batch, with its loss, from (inputs, targets, index)."""
        inputs, targets, index = item
        mixture = self.weighted(epoch)
        taught = any(_uses_teacher(term) for _, term in mixture.values())
        with torch.no_grad():
            batch = Batch(inputs, targets, self.setting.teacher(inputs) if taught else None, index)
        outputs = self.setting.student(inputs)
        losses = (weight * term(outputs, batch).mean() for weight, term in mixture.values())
        return batch, sum(losses, outputs.new_zeros(()))


def _uses_teacher(term: terms.Term) -> bool:
    return bool(getattr(term, "uses_teacher", True))
