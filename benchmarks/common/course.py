"""A student's whole training on a small task as a bilevel problem, the arguments of `hypergradient`."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.common.small_tasks import TASKS, Task, endless, rows_of, student
from metakd import Batch, hypergradient, meta_in_training
from metakd.estimators.build import build_problem
from metakd.terms import evaluate
from metakd.weighting import GroupTable, Pinned, SampleTable

GROUPS = {"sources": ("source", 12), "long tail": ("targets", 10)}
"""Task -> the column whose groups have a weight each, and how many groups there are."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "GELU": nn.GELU}
"""Of the student's hidden layer."""
PIECES, AMONG = 3, 0.3
"""Pieces of time, each with weights of its own; the weight of the meta images among the training images."""
DECAY = 2 / 3
"""The share of the steps after which the learning rate is a tenth: the last piece of time begins there."""
GROUP, SAMPLE = "model.groups.free", "model.samples.free"
"""The free numbers of the weights by group and piece of time, and by sample."""


class Product(nn.Module):
    """A weight for each group and piece of time, times one for each sample."""

    def __init__(self, groups: nn.Module, samples: nn.Module) -> None:
        super().__init__()
        self.groups, self.samples = groups, samples

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        weights: Tensor = self.groups(features, batch) * self.samples(features, batch)
        return weights


@dataclass(frozen=True)
class Course:
    """A training from a fixed start with a fixed order of batches; the meta images are in each of them.

    Attributes:
        task: its data.
        seed: of the data, the start and the order.
        model: the student; its parameters are the start and do not change.
        weighting: all weights are 1, and 0.3 for meta images.
        batches: of each step.
        optimizer: the student's.
    """

    task: Task
    seed: int
    model: nn.Sequential
    weighting: nn.Module
    batches: Sequence[Batch]
    optimizer: Any

    @classmethod
    def build(cls, name: str, seed: int, steps: int, activation: str = "ReLU") -> "Course":
        """The training of a task, a key of `GROUPS`, with one of `ACTIVATIONS`."""
        task, (column, groups) = TASKS[name](seed), GROUPS[name]
        model, optimizer = student(seed, ACTIVATIONS[activation])
        given = optimizer.defaults
        sgd = torchopt.sgd(
            lr=rate_at(steps, given["lr"]), momentum=given["momentum"], weight_decay=given["weight_decay"]
        )
        table = Product(GroupTable("cell", groups * PIECES, 1), SampleTable(len(task.train.targets), 1))

        def cell(batch: Batch, step: int) -> Tensor:
            group = batch.targets if column == "targets" else (batch.columns or {})[column]
            return group + groups * (PIECES * step // steps)

        batches = [
            batch._replace(columns={**(batch.columns or {}), "cell": cell(batch, step)})
            for step, batch in zip(range(steps), loader(task, seed), strict=False)
        ]
        return cls(task, seed, model, Pinned(table, AMONG), batches, sgd)

    def inner(self, params: Any, weights: Any, batch: Batch) -> Tensor:
        """The weighted loss of a batch."""
        losses = evaluate(self.task.terms, self.outputs(params, batch.inputs), batch)
        return (functional_call(self.weighting, weights, (losses.detach(), batch)) * losses).sum() / len(losses)

    def outer(self, params: Any, weights: Any, meta: Batch) -> Tensor:
        """The meta loss."""
        return F.cross_entropy(self.outputs(params, meta.inputs), meta.targets)

    def meta_loss(self, params: Any) -> float:
        """The same, as a number."""
        return float(self.outer(params, None, self.task.meta))

    def outputs(self, params: Any, inputs: Tensor) -> Tensor:
        """The student's logits."""
        logits: Tensor = functional_call(self.model, params, (inputs,))
        return logits

    @property
    def equal(self) -> dict[str, Tensor]:
        """The free numbers where all weights are 1."""
        return {name: free.detach().clone() for name, free in self.weighting.named_parameters()}

    def problem(self, weights: Mapping[str, Tensor], begin: int = 0, checkpoint: Any = None) -> dict[str, Any]:
        """The arguments of `hypergradient` from a step on; from the second step on with a checkpoint of `trained`."""
        start = {name: p.detach() for name, p in self.model.named_parameters()}
        params, state = checkpoint or (start, None)
        return {
            "inner": self.inner, "outer": self.outer, "params": params, "meta_params": weights,
            "batches": self.batches[begin:], "optimizer": self.optimizer, "optimizer_state": state,
            "outer_batches": [self.task.meta],
        }  # fmt: skip

    def trained(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """The parameters and the optimizer's state after all steps, without a hypergradient."""
        return build_problem(**self.problem(weights)).sweep()

    def in_float64(self) -> "Course":
        """The same in float64."""

        def double(batch: Batch) -> Batch:
            return batch._replace(inputs=batch.inputs.double())

        model, weighting = (copy.deepcopy(module).double() for module in (self.model, self.weighting))
        task = self.task._replace(meta=double(self.task.meta))
        batches = [double(batch) for batch in self.batches]
        return replace(self, task=task, model=model, weighting=weighting, batches=batches)

    def until(self, step: int) -> "Course":
        """The first steps."""
        return replace(self, batches=self.batches[:step])

    def descended(
        self, name: str, steps: int, size: float, begin: int = 0
    ) -> tuple[dict[str, Tensor], list[tuple[float, dict[str, Tensor]]]]:
        """Sign descent of the final meta loss in some weights, from equal ones.

        Args:
            name: `GROUP` or `SAMPLE`.
            steps: how many outer steps, a hypergradient each.
            size: of each.
            begin: the inner step from which on the weights are learned.

        Returns:
            The free numbers, and before each outer step the meta loss and the student's parameters.
        """
        weights, path = self.equal, []
        checkpoint = self.until(begin).trained(weights) if begin else None
        for _ in range(steps):
            found = hypergradient(**self.problem(weights, begin, checkpoint))
            path.append((float(found.outer_loss), dict(found.params)))
            weights = {**weights, name: weights[name] - size * found.gradient[name].sign()}
        return weights, path


def loader(task: Task, seed: int, kept: Tensor | None = None) -> Iterator[Batch]:
    """Batches of training and meta images without end; of the training images those kept."""
    order, meta_order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    train = task.train if kept is None else rows_of(task.train, kept.nonzero().flatten())
    return (batch for batch, _ in meta_in_training(endless(train, order), endless(task.meta, meta_order)))


def rate_at(steps: int, rate: float) -> Callable[[Any], float]:
    """The learning rate of each step."""
    return lambda step: rate if step < int(DECAY * steps) else rate / 10


def smoothness(here: Mapping[str, Tensor], there: Mapping[str, Tensor], further: Mapping[str, Tensor]) -> float:
    """Empirical metasmoothness (Engstrom et al., 2025), from -1 to 1, by the parameters of three trained students.

    Their weights are phi, phi + h v and phi + 2 h v. Of each parameter it compares the signs of both differences, and
    counts it by the first one's size.

    Example:
        >>> a, b, c = ({"w": torch.tensor(w)} for w in ([0.0, 0.0], [3.0, 1.0], [4.0, 0.0]))
        >>> smoothness(a, b, c)
        0.5
    """
    first, second = (
        torch.cat([(new[name] - old[name]).flatten() for name in old]) for old, new in ((here, there), (there, further))
    )
    return float((first.abs() * (first * second).sign()).sum() / first.abs().sum())
