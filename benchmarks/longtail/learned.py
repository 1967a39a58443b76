"""Methods whose weights are learned, and the controls that take the learning apart."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.longtail.setting import Setting
from metakd import Batch, BilevelLossBalancer, MetaKDError


class Permuted(nn.Module):
    """Another model's weights, each sample's given to the next sample of the shuffled batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """(B, M) weights."""
        weights: Tensor = self.model(features, batch)
        return weights.roll(1, dims=0)


class MeanOverEpoch(nn.Module):
    """Another model's weights, their mean over the last epoch in place of each; in the first epoch, over it so far."""

    total: Tensor
    last: Tensor

    def __init__(self, model: nn.Module, terms: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("total", torch.zeros(terms + 1))  # the last entry counts samples
        self.register_buffer("last", torch.zeros(terms + 1))

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """(B, M) weights."""
        weights: Tensor = self.model(features, batch)
        with torch.no_grad():
            self.total += torch.cat([weights.sum(0), weights.new_full((1,), len(weights))])
        mean = torch.where(self.last[-1] > 0, self.last, self.total)
        return (mean[:-1] / mean[-1]).expand(len(weights), -1)

    def end_epoch(self) -> None:
        """What was seen so far is the last epoch from now on."""
        self.last.copy_(self.total)
        self.total.zero_()


CONTROLS = ("frozen", "permuted", "mean")


@dataclass(frozen=True)
class Learned:
    """A balancer, or a control of it.

    Attributes:
        title: the method's name in the table.
        build: the balancer of a cell.
        steps: inner steps that a hypergradient looks ahead.
        control: one of `CONTROLS`, or None.
    """

    title: str
    build: Callable[[Setting], BilevelLossBalancer]
    steps: int = 1
    control: str | None = None

    def __call__(self, setting: Setting) -> "LearnedObjective":
        """The loss of one cell."""
        return LearnedObjective(self.build(setting), setting, self.steps, self.control)


class LearnedObjective:
    """See `setting.Objective`.

    Under the controls `permuted` and `mean` the weight model learns as ever, and a second balancer, which only
    weighs, gives the student its loss.
    """

    def __init__(self, balancer: BilevelLossBalancer, setting: Setting, steps: int, control: str | None) -> None:
        self.balancer, self.steps, self.control = balancer, steps, control
        self.parts: dict[str, Any] = {"balancer": balancer}
        self.acting = balancer
        if control in ("permuted", "mean"):
            if balancer.weighting_optimizer is None:
                raise MetaKDError(f"the control {control!r} needs a weight model with parameters")
            model = balancer.weighting
            acting = Permuted(model) if control == "permuted" else MeanOverEpoch(model, len(balancer.terms))
            self.parts["acting"] = acting
            self.acting = BilevelLossBalancer(
                balancer.student,
                balancer.terms,
                optimizer=balancer.optimizer,
                teacher=balancer.teacher,
                features=balancer.features,
                weighting=acting.to(next(balancer.student.parameters()).device),
            )

    def epoch(self, epoch: int, batches: Iterable[Any], meta_batches: Iterator[Any]) -> Iterator[tuple[Batch, Tensor]]:
        """See `setting.Objective`."""
        if self.steps > 1:
            batches = self.balancer.windows(batches, meta_batches, self.steps)
        for item in batches:
            batch = item if isinstance(item, Batch) else Batch(item[0], item[1], index=item[2])
            if self.control in ("permuted", "mean"):
                self.balancer.meta_step([batch], next(meta_batches))
            learns = self.steps == 1 and self.control is None
            yield batch, self.acting(batch, next(meta_batches) if learns else None)
        if isinstance(self.acting.weighting, MeanOverEpoch):
            self.acting.weighting.end_epoch()
