"""The figures of one data set and imbalance: accuracy by class, and what the weight models learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.longtail import methods, snapshots
from metakd import plots
from metakd.longtail import group_classes
from metakd.longtail import plots as of_longtail
from metakd.monitor.history import History

BY_CLASS = ("ce", "kd", "bskd", "mixture", "bikd", "bikd-k5-inputs", "best")
LEARNED = ("bikd", "bikd-k5-inputs", "best")
"""Whose weights are drawn."""


def draw(folder: Path, stem: str, cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Draw what there are cells for; the files written."""
    first = next(iter(cells.values()))[0]
    counts, classes = first["counts"], first["classes"]
    written: list[Path] = []

    def path(name: str) -> Path:
        written.append(folder / f"{stem}-{name}.png")
        return written[-1]

    chosen = [name for name in BY_CLASS if name in cells]
    if chosen:
        accuracy = {
            name if name in of_longtail.STYLES else methods.find(name).title: torch.tensor(
                [cell["test"]["per_class"] for cell in cells[name]]
            )
            .mean(0)
            .tolist()
            for name in chosen
        }
        title = f"Accuracy by class, {stem}, mean of the seeds"
        of_longtail.class_accuracy(accuracy, counts, classes, path("class-accuracy"), title=title)
    groups = {name: list(members) for name, members in group_classes(counts)._asdict().items() if name != "rule"}
    for name in LEARNED:
        for cell in cells.get(name, [])[:1]:
            seed = f"{methods.find(name).title}, {stem}, seed {cell['settings']['seed']}"
            history = history_of(cell["learned"], len(counts))
            plots.weights_by_class(
                history, classes=classes, counts=counts, title=f"Weights by class: {seed}", path=path(f"{name}-weights")
            )
            plots.weights_over_time(
                history, groups=groups, title=f"Weights over time: {seed}", path=path(f"{name}-weights-over-time")
            )
            plots.influence_over_time(
                history, groups=groups, title=f"Influence over time: {seed}", path=path(f"{name}-influence-over-time")
            )
            by_loss = {e["epoch"]: e["weights_by_loss"] for e in cell["history"] if "weights_by_loss" in e}
            if by_loss:
                title = f"Weights by loss: {seed}"
                snapshots.draw(by_loss, history.terms, path(f"{name}-weights-by-loss"), title=title)
    return written


POINTS = 40
"""Windows of a run's history."""


def saved(history: History) -> dict[str, Any]:
    """A history as numbers of four digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return snapshots.rounded(value.tolist()) if isinstance(value, torch.Tensor) else value

    return dict(plain(history.state_dict()))


def history_of(learned: Mapping[str, Any], classes: int) -> History:
    """The history that `saved` wrote."""
    state = {
        key: torch.tensor(value) if key in ("samples", "calls", "counted") else value
        for key, value in learned["history"].items()
    }
    if "learned" in state:
        state["learned"] = {name: torch.tensor(sums) for name, sums in state["learned"].items()}
    history = History(state["terms"], classes, points=POINTS)
    history.load_state_dict(state)
    return history
