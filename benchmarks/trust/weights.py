"""Weights of training samples: those fixed beforehand, and the models of learned ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trust.data import Task
from benchmarks.trust.recipes import Recipe
from metakd import Batch
from metakd.weighting import ClassTable, GroupTable, SampleTable

Judge = Callable[[Tensor], Tensor]
"""A network that was trained on the meta samples: inputs -> logits."""


def terms_of(task: Task) -> int:
    """How many terms a sample has: one for each teacher, or one."""
    return 1 if task.train.teacher is None else len(task.train.teacher)


def fixed(recipe: Recipe, task: Task, judge: Callable[[], Judge], seed: int) -> Tensor:
    """Weights of all training samples, `(N, M)`; `judge` is asked where agreement counts."""
    train, count = task.train, len(task.train.targets)
    ones = torch.ones(count, 1 if recipe.term.startswith("stacked") else terms_of(task))
    generator = torch.Generator().manual_seed(1000 * seed + recipe.draw)
    if recipe.weights == "oracle":
        found = task.right.float().view(count, -1)
    elif recipe.weights == "confident":
        found = _surest(torch.stack([z.softmax(1).amax(1) for z in train.teacher], 1))
    elif recipe.weights == "random":
        if train.teacher is not None:
            found = torch.rand(ones.shape[1], generator=generator).expand_as(ones)
        else:
            rows = groups_of(recipe, train)
            found = torch.rand(int(rows.max()) + 1, generator=generator)[rows].unsqueeze(1)
    elif recipe.weights == "agreement":
        trust = precision(task) if train.teacher is not None else agreement(recipe, task, judge())
        if train.teacher is None:
            by_group = recipe.by and recipe.start != "agreement"
            found = kept(trust, groups_of(recipe, train) if by_group else None, recipe.keep).unsqueeze(1)
        else:
            found = _surest(trust) if recipe.keep < 1 else trust / trust.sum(1, keepdim=True).clamp_min(1e-6)
    else:
        found = ones
    return recipe.scale * found


def groups_of(recipe: Recipe, train: Batch) -> Tensor:
    """The group of each sample by the recipe's column, or its label."""
    return train.columns[recipe.by] if recipe.by and train.columns else train.targets


def agreement(recipe: Recipe, task: Task, judge: Judge) -> Tensor:
    """For each sample the judge's probability of its label, or the mean of that over its group."""
    train = task.train
    with torch.no_grad():
        own = judge(train.inputs).softmax(1).gather(1, train.targets.unsqueeze(1)).squeeze(1)
    if not recipe.by or recipe.weights == recipe.start:  # the second time it is asked of each sample
        return own
    rows = groups_of(recipe, train)
    size = int(rows.max()) + 1
    means = own.new_zeros(size).index_add_(0, rows, own) / torch.bincount(rows, minlength=size).clamp_min(1)
    return means[rows]


def precision(task: Task) -> Tensor:
    """How often each teacher's answer to a meta sample is right where it answers the same as here, `(N, M)`."""
    trust = []
    for here, there in zip(task.train.teacher, task.meta.teacher, strict=True):
        said, right = there.argmax(1), (there.argmax(1) == task.meta.targets).float()
        counts = torch.bincount(said, minlength=here.shape[1]).float()
        share = torch.zeros(here.shape[1]).index_add_(0, said, right) / counts.clamp_min(1)
        trust.append(share[here.argmax(1)])
    return torch.stack(trust, 1)


def kept(trust: Tensor, groups: Tensor | None, share: float) -> Tensor:
    """1 for the most trusted share of the samples, whole groups of them, else 0."""
    if groups is not None:
        trust = trust + groups * 1e-9  # no ties between groups
    order = trust.argsort(descending=True)
    limit = trust[order[max(round(share * len(order)), 1) - 1]]
    return (trust >= limit).float()


def _surest(values: Tensor) -> Tensor:
    return F.one_hot(values.argmax(1), values.shape[1]).float()


class ByAnswer(nn.Module):
    """One weight for each teacher and answer: how far to trust it when it says so; reads the columns `answer k`."""

    def __init__(self, teachers: int, classes: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(GroupTable(f"answer {k}", classes, 1, init=0.5) for k in range(teachers))

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, M)`."""
        return torch.cat([table(features, batch) for table in self.tables], 1)

    def default_optimizer(self) -> torch.optim.Optimizer:
        """That of a table."""
        return torch.optim.Adam(self.parameters(), lr=0.1)


class ByGroupAndLoss(nn.Module):
    """A weight that falls with the sample's loss, by group: `2 sigmoid(a_g - b_g (loss - 2))`, both numbers learned.

    It reads the first feature, which must be a loss; `b` starts at 1. A group whose labels are right as often as not
    can be trusted where the loss is small.
    """

    def __init__(self, column: str, groups: int) -> None:
        super().__init__()
        self.numbers = GroupTable(column, groups, 2, init=0.0, output="identity")
        with torch.no_grad():
            self.numbers.free[:, 1] = 1.0

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Return the weights, shape `(B, 1)`."""
        trust, fall = self.numbers(features, batch).unbind(1)
        return 2 * torch.sigmoid(trust - fall * (features[:, 0] - 2)).unsqueeze(1)

    def default_optimizer(self) -> torch.optim.Optimizer:
        """That of a table."""
        return torch.optim.Adam(self.parameters(), lr=0.1)


def model_of(recipe: Recipe, task: Task, judge: Callable[[], Judge]) -> nn.Module:
    """An untrained table for the recipe."""
    count = len(task.train.targets)
    if recipe.term.startswith("stacked"):
        return ClassTable(task.classes, 1)  # all training labels are 0: one number
    if recipe.weights == "teachers":
        return ByAnswer(terms_of(task), task.classes)
    if recipe.weights == "samples":
        return SampleTable(count, 1)
    if recipe.weights == "gates":
        by = recipe.by or "targets"
        return ByGroupAndLoss(by, task.classes if not recipe.by else int(groups_of(recipe, task.train).max()) + 1)
    if recipe.weights == "classes":
        return ClassTable(task.classes, 1)
    rows = groups_of(recipe, task.train)
    table = GroupTable(recipe.by, task.groups * (task.classes if recipe.by == "cell" else 1), 1)
    if recipe.start == "agreement":
        trust = agreement(recipe, task, judge())
        weight = (2 * trust / trust.max()).clamp(0.1, 1.9)
        with torch.no_grad():
            table.free[rows, 0] = (weight / (2 - weight)).log()
    return table


def with_answers(batch: Batch) -> Batch:
    """The batch with the class that each teacher answers as columns `answer k`."""
    if batch.teacher is None:
        return batch
    columns = {f"answer {k}": z.argmax(1) for k, z in enumerate(batch.teacher)}
    return batch._replace(columns={**(batch.columns or {}), **columns})
