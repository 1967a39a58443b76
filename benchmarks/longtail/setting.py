"""What a method is given, and what it gives back to the training loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.longtail.presets import Preset
from metakd import Batch, BilevelLossBalancer
from metakd.recipes.base import adam, beside
from metakd.terms import Term
from metakd.weighting import LossMLP


class Setting(NamedTuple):
    """One cell's parts.

    Attributes:
        student: the network to train.
        teacher: trained on the same long tail; a module, which runs in eval mode, or a function.
        optimizer: the student's.
        counts: training images of each class.
        preset: the cell's other settings.
    """

    student: nn.Module
    teacher: Callable[..., Any]
    optimizer: Optimizer
    counts: tuple[int, ...]
    preset: Preset

    def balancer(
        self,
        terms: Mapping[str, Term],
        weighting: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        terms_lr: float = 1e-2,
        **options: Any,
    ) -> BilevelLossBalancer:
        """A balancer of these parts, whose weight model is learned by Adam, as are terms with parameters."""
        model = beside(self.student, weighting)
        optimizer = adam(model, lr, weight_decay)
        for term in terms.values():
            if isinstance(term, nn.Module):
                own = beside(self.student, term).parameters()
                optimizer.add_param_group({"params": list(own), "lr": terms_lr, "weight_decay": 0.0})
        parts = {"optimizer": self.optimizer, "teacher": self.teacher, "weighting": model, **options}
        return BilevelLossBalancer(self.student, terms, weighting_optimizer=optimizer, **parts)

    def network(self, inputs: int) -> LossMLP:
        """BiKD's weight model of two terms, with as many layers as its authors recommend."""
        return LossMLP(inputs, 2, hidden=(64,) if len(self.counts) < 100 else (64, 64))


class Objective(Protocol):
    """The loss a method trains with.

    Attributes:
        parts: what a checkpoint must hold of it.
        balancer: of a learned method, else None.
    """

    parts: dict[str, Any]
    balancer: BilevelLossBalancer | None

    def epoch(self, epoch: int, batches: Iterable[Any], meta_batches: Iterator[Any]) -> Iterator[tuple[Batch, Tensor]]:
        """The epoch's batches, each with its loss, on which the loop runs `backward()` and `optimizer.step()`."""
