"""One run: train a student by a recipe, and say how well it does."""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.trust import weights
from benchmarks.trust.data import Task, endless, rows_of
from benchmarks.trust.losses import ByOrigin, Stacked, fit_stacking
from benchmarks.trust.presets import Preset
from benchmarks.trust.recipes import LEARNED, Recipe
from benchmarks.trust.settings import Where, task_of
from benchmarks.trust.students import network
from metakd import Batch, BilevelLossBalancer, MetaKDError, meta_in_training, recipes
from metakd.terms import (
    CrossEntropy,
    ForwardCorrected,
    FromTeacher,
    GeneralisedCrossEntropy,
    SoftTarget,
    Term,
    estimated_transition,
    evaluate,
)
from metakd.weighting import Pinned
from metakd.weighting.features import Features


class Cell:
    """A setting, a meta set and a seed; what several recipes need of them is made once."""

    def __init__(self, setting: str, preset: Preset, meta: int, seed: int, where: Where) -> None:
        self.preset, self.seed = preset, seed
        self.task = task_of(setting, preset, meta, seed, where)
        train = weights.with_answers(self.task.train)
        self.task = self.task._replace(train=train, meta=weights.with_answers(self.task.meta))

    @cache  # noqa: B019 (cells are few)
    def judge(self) -> nn.Module:
        """A network that was trained on the meta samples alone."""
        return self.student(Recipe(weights="none", meta=1.0))

    @cache  # noqa: B019
    def transition(self) -> Tensor:
        """The estimate of GLC: by a network that was trained on the given labels, from the meta samples."""
        return estimated_transition(self.student(Recipe()), [(self.task.meta.inputs, self.task.meta.targets)])

    def student(self, recipe: Recipe) -> nn.Module:
        """A student that was trained by a recipe with fixed weights."""
        return trained(self, recipe, weights.fixed(recipe, self.task, self.judge_for(recipe), self.seed))[0]

    def judge_for(self, recipe: Recipe) -> Callable[[], weights.Judge]:
        """Who judges the labels: where agreement starts from agreement, the student that it gave the first time."""
        if recipe.weights == recipe.start == "agreement":
            first = Recipe(weights="agreement", by=recipe.by, keep=0.5, scale=2.0, meta=0.3)
            return partial(self.kept_student, first)
        return self.judge

    @cache  # noqa: B019
    def kept_student(self, recipe: Recipe) -> nn.Module:
        """A student, trained once; with learned weights, too."""
        return trained(self, recipe, None)[0] if is_learned(recipe) else self.student(recipe)


def found_by(cell: Cell, recipe: Recipe) -> dict[str, Any]:
    """Train by a recipe; the record of it.

    Returns:
        validation, test: accuracy in percent after the last step; seconds: CPU time. Of learned weights: by group where
        there are groups, and how well influences and final weights tell right labels from wrong ones (area under the
        curve; a half says nothing); with `controls` also accuracies of students that were trained with the final
        weights (fixed, permuted, their mean).
    """
    start = time.process_time()
    given = None
    if not is_learned(recipe):
        given = weights.fixed(recipe, cell.task, cell.judge_for(recipe), cell.seed)
    student, balancer, seen = trained(cell, recipe, given)
    found: dict[str, Any] = {**scores(cell.task, student), "seconds": round(time.process_time() - start, 2)}
    if balancer is None:
        return found
    found |= _about(cell, recipe, balancer, seen)
    if recipe.controls:
        final = balancer.weights(cell.task.train)
        generator = torch.Generator().manual_seed(cell.seed)
        again = {
            "final, fixed": final,
            "permuted": permuted(final, recipe, cell.task, generator),
            "mean": final.mean().expand_as(final),
        }
        for name, values in again.items():
            found[name] = scores(cell.task, trained(cell, recipe, values)[0])
    return found


def is_learned(recipe: Recipe) -> bool:
    """Whether there is anything to learn beside the student."""
    return recipe.weights in LEARNED or recipe.term == "stacked learned"


def permuted(final: Tensor, recipe: Recipe, task: Task, generator: torch.Generator) -> Tensor:
    """Each group, or sample, with the weight of another one."""
    if task.train.teacher is not None:
        return final[:, torch.randperm(final.shape[1], generator=generator)].roll(1, 1)
    if recipe.weights != "table":
        return final[torch.randperm(len(final), generator=generator)]
    rows = weights.groups_of(recipe, task.train)
    table = final.new_zeros(int(rows.max()) + 1, final.shape[1])
    table[rows] = final
    return table[torch.randperm(len(table), generator=generator)][rows]


def scores(task: Task, student: nn.Module) -> dict[str, float]:
    """Accuracies in percent."""
    return {"validation": accuracy(student, task.validation), "test": accuracy(student, task.test)}


@torch.no_grad()
def accuracy(student: nn.Module, batch: Batch) -> float:
    """In percent."""
    return round(100 * float((student(batch.inputs).argmax(1) == batch.targets).float().mean()), 2)


def trained(
    cell: Cell, recipe: Recipe, given: Tensor | None
) -> tuple[nn.Module, BilevelLossBalancer | None, list[tuple[Tensor, Tensor]]]:
    """Train a student with given weights, or with learned ones where none are given.

    Returns:
        The student, its balancer, and pairs of positions and influences of the second half of training.
    """
    task, preset = cell.task, cell.preset
    student = network(task, preset, cell.seed)
    optimizer = torch.optim.SGD(student.parameters(), lr=recipe.faster * preset.lr, momentum=0.9, weight_decay=5e-4)
    schedule = CosineAnnealingLR(optimizer, preset.steps)
    terms = terms_for(cell, recipe)
    balancer = balancer_of(cell, recipe, student, optimizer, terms) if given is None else None
    seen = []
    for step, (batch, meta_batch) in enumerate(batches(cell, recipe)):
        if balancer is not None:
            loss = balancer(batch, meta_batch if (step + 1) % recipe.every == 0 else None)
            if 2 * step >= preset.steps and balancer.report.influence is not None and batch.index is not None:
                seen.append((batch.index, balancer.report.influence))
        elif recipe.weights == "none":
            loss = CrossEntropy()(student(meta_batch.inputs), meta_batch).mean()
        else:
            losses = evaluate(terms, student(batch.inputs), batch)
            loss = (of_batch(recipe, batch, given, losses) * losses).sum() / len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval(), balancer, seen


def of_batch(recipe: Recipe, batch: Batch, given: Tensor, losses: Tensor) -> Tensor:
    """The weights of a batch's samples, those of meta samples among them."""
    values = given[batch.index.clamp_min(0)]
    from_meta = (batch.columns or {}).get("from_meta", torch.zeros(len(losses))).unsqueeze(1) == 1
    if recipe.weights == "trimmed":
        own = losses.detach().masked_fill(from_meta, math.inf)
        kept = round(recipe.keep * int((~from_meta).sum()))
        values = values * (own <= own.flatten().sort().values[max(kept, 1) - 1])
    return torch.where(from_meta, recipe.meta or 0.0, values)


def batches(cell: Cell, recipe: Recipe) -> Iterator[tuple[Batch, Batch]]:
    """A training batch for each step, with meta samples in it if the recipe says so, and a meta batch."""
    size, seed, meta = cell.preset.batch_size, cell.seed, cell.task.meta
    train = (batch for _, batch in zip(range(cell.preset.steps), endless(cell.task.train, size, seed), strict=False))
    folds = []
    for k in range(recipe.folds):
        own = torch.arange(len(meta.targets))[k :: recipe.folds]
        folds.append(endless(rows_of(meta, own), size, seed + 1000 + k))
    if recipe.meta is None or recipe.weights == "none":
        return zip(train, folds[0], strict=False)
    return meta_in_training(train, tuple(folds))


def terms_for(cell: Cell, recipe: Recipe) -> dict[str, Term]:
    """The losses of a recipe; a new object each time, for some learn."""
    task = cell.task
    if recipe.term == "teachers":
        count = weights.terms_of(task)
        return {f"teacher {k}": ByOrigin(FromTeacher(SoftTarget(2.0), k), meta=k == 0) for k in range(count)}
    if recipe.term.startswith("stacked"):
        return {"stacked": ByOrigin(Stacked(*fit_stacking(task.meta), learned=recipe.term != "stacked"))}
    made: dict[str, Term] = {"ce": CrossEntropy(), "gce": GeneralisedCrossEntropy(recipe.q)}
    if recipe.term.startswith("forward"):
        learned = recipe.term == "forward learned"
        smooth = 0.95 * cell.transition() + 0.05 / task.classes
        made[recipe.term] = ForwardCorrected(smooth if learned else cell.transition(), learned=learned)
    return {"label": ByOrigin(made[recipe.term], task.log_prior)}


def balancer_of(
    cell: Cell, recipe: Recipe, student: nn.Module, optimizer: torch.optim.Optimizer, terms: dict[str, Term]
) -> BilevelLossBalancer:
    """The balancer of a recipe with learned weights."""
    if recipe.weights == "mwn":
        return recipes.meta_weight_net(student, optimizer=optimizer, setting="noise")
    if recipe.weights == "l2rw":
        return recipes.learning_to_reweight(student, optimizer=optimizer)
    table = weights.model_of(recipe, cell.task, cell.judge)
    weighting = Pinned(table, 1.0 if recipe.meta is None else recipe.meta)
    learned = [
        p for term in terms.values() if isinstance(term, nn.Module) for p in term.parameters() if p.requires_grad
    ]
    groups = [{"params": table.parameters()}, *([{"params": learned, "lr": recipe.rate / 10}] if learned else [])]
    return BilevelLossBalancer(
        student,
        terms,
        optimizer=optimizer,
        weighting=weighting,
        weighting_optimizer=torch.optim.Adam(groups, lr=recipe.rate),
        features=_features(cell, recipe),
    )


def _features(cell: Cell, recipe: Recipe) -> Features:
    """The losses; on the second look those of the student of the first one, which learned a table."""
    if recipe.start != "table":
        return lambda losses, outputs, batch: losses
    first = cell.kept_student(Recipe(weights="table" if recipe.by else "samples", by=recipe.by, meta=recipe.meta))
    with torch.no_grad():
        known = CrossEntropy()(first(cell.task.train.inputs), cell.task.train)

    def looked_up(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
        return known[losses.new_zeros(len(losses)).long() if batch.index is None else batch.index.clamp_min(0)][:, None]

    return looked_up


def _about(
    cell: Cell, recipe: Recipe, balancer: BilevelLossBalancer, seen: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """What was learned; see `found_by`."""
    task, found = cell.task, {}
    right = task.right.view(len(task.train.targets), -1)
    if seen:
        index, influence = (torch.cat(parts) for parts in zip(*seen, strict=True))
        own = index >= 0
        if influence.shape[1] == right.shape[1] and len(task.train.targets):
            found["auc of influences"] = area(-influence[own], right[index[own]])
    if recipe.weights in ("l2rw", "mwn"):
        return found
    final = balancer.weights(task.train)
    if final.shape == right.shape:
        found["auc of weights"] = area(final, right)
    found["mean weight"] = round(float(final.mean()), 4)
    if task.groups and recipe.weights == "table":
        group = task.train.columns["group"]
        found["by group"] = [round(float(final[group == g].mean()), 4) for g in range(task.groups)]
        found["right by group"] = [round(float(right[group == g].float().mean()), 4) for g in range(task.groups)]
    return found


def area(values: Tensor, right: Tensor) -> float:
    """The area under the curve: how often a right label's value is higher than a wrong one's."""
    values, right = values.flatten(), right.flatten()
    if bool(right.all()) or not bool(right.any()):
        return math.nan
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    n, m = int(right.sum()), int((~right).sum())
    return round(float((ranks[right].sum() - n * (n + 1) / 2) / (n * m)), 4)


def failed(error: MetaKDError) -> dict[str, Any]:
    """The record of a run that diverged: it has neither accuracy."""
    return {"failed": str(error)[:160], "validation": 0.0, "test": 0.0}
