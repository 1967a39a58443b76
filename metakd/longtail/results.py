"""The record of a run: its settings, versions and hardware, the figures, and the final table."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metakd import plots
from metakd.longtail.batches import LongTailed
from metakd.longtail.checkpoint import write_atomically
from metakd.longtail.metrics import Scores, group_classes
from metakd.longtail.plots import class_accuracy, training_curves, weights_by_source
from metakd.longtail.sources import Sourced
from metakd.monitor.history import History
from metakd.monitor.learned_weights import LearnedWeights

_PACKAGES = ("metakd", "torch", "torchopt", "torchjd", "torchvision", "torchmetrics", "scikit-learn")
_COLUMNS = ("overall", "many", "medium", "few")


class Run(NamedTuple):
    """One network's training.

    Attributes:
        history: one entry per epoch: ``seconds`` of training, ``train_loss``, and, if it was evaluated,
            ``test_loss``, ``test_accuracy`` and ``validation_accuracy``.
        scores: test scores after the last epoch.

    Examples:
        >>> Run([{"seconds": 1.5}, {"seconds": 1.0}], Scores(90.0, 95.0, 90.0, 85.0, (), 0.3, 2.0)).seconds
        2.5
    """

    history: list[dict[str, Any]]
    scores: Scores

    @property
    def seconds(self) -> float:
        """Seconds of training, without evaluation."""
        return float(sum(entry["seconds"] for entry in self.history))


def provenance() -> dict[str, Any]:
    """The command, and the versions and hardware that may change a number.

    Returns:
        Plain numbers and texts, fit for JSON.

    Examples:
        >>> sorted(provenance())
        ['command', 'hardware', 'threads', 'versions']
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions,
        "hardware": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "threads": torch.get_num_threads(),
    }


def write_report(
    folder: Path,
    runs: Mapping[str, Run],
    data: LongTailed,
    *,
    arguments: Mapping[str, Any],
    learned: LearnedWeights | None = None,
    seen: History | None = None,
    sourced: Sourced | None = None,
) -> list[Path]:
    """Write ``results.json`` and the figures.

    Args:
        folder: where to.
        runs: name -> run; one named ``teacher`` is in the record, but not in the figures.
        data: the data trained on.
        arguments: the settings of the runs, including ``seed``.
        learned: the weights that a bilevel method learned.
        seen: the history of its weights by source.
        sourced: the sources, with `seen`.

    Returns:
        The files written.

    Examples:
        >>> import tempfile
        >>> from metakd.longtail import load_images
        >>> data = LongTailed.cut(load_images("digits"), 20, validation_per_class=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_report(Path(folder), {}, data, arguments={"seed": 0})]
        ['results.json']
    """
    groups = group_classes(data.counts)
    record = provenance() | {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()},
        "seed": arguments.get("seed"),
        "data": {"description": data.describe(), "classes": data.classes, "counts": data.counts},
        "groups": groups._asdict(),
        "accuracy": "test accuracy in percent after the last epoch; no epoch was selected",
        "runs": {
            name: {"last_epoch": run.scores._asdict(), "seconds": run.seconds, "history": run.history}
            for name, run in runs.items()
        },
    }
    students = {name: run for name, run in runs.items() if name != "teacher"}
    title = f"long-tailed {data.title}, {max(data.counts):,} to {min(data.counts):,} training images a class"
    written = [folder / "results.json"]

    def figure(name: str) -> Path:
        written.append(folder / name)
        return folder / name

    if students:
        histories = {name: run.history for name, run in students.items()}
        training_curves(histories, figure("training_curves.png"), title=f"Training on {title}")
        accuracy = {name: run.scores.per_class for name, run in students.items()}
        path = figure("class_accuracy.png")
        class_accuracy(accuracy, data.counts, data.classes, path, title=f"Accuracy by class: {title}")
    if learned is not None:
        by_class = learned.by_class(len(data.classes))
        names = list(learned.balancer.terms)
        record["learned_weights"] = {"terms": names, "by_class": by_class.tolist()}
        plots.weights_by_class(
            by_class,
            terms=names,
            classes=data.classes,
            counts=data.counts,
            title=f"Learned weights by class: {title}",
            path=figure("weights_by_class.png"),
        )
        plots.weights_by_loss(
            learned.balancer,
            learned.features,
            title=f"Learned weights by loss: {title}",
            path=figure("weights_by_loss.png"),
        )
    if sourced is not None:
        record["sources"] = {"kinds": sourced.kinds, "counts": sourced.counts, "right": sourced.right}
    if seen is not None and sourced is not None:
        record["learned_weights"] = {"terms": seen.terms, "by_source": seen.by_class("weights").tolist()}
        weights_by_source(
            seen, sourced.kinds, figure("weights_by_source.png"), title=f"Learned weights by source: {title}"
        )
    write_atomically(written[0], lambda file: file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    return written


def summary(runs: Mapping[str, Run], data: LongTailed) -> str:
    """The final table of a run: overall, many, medium and few accuracy, and the seconds of training.

    Args:
        runs: name -> run.
        data: the data trained on.

    Returns:
        The title, the table and the rule of the groups, as text.

    Examples:
        >>> from metakd.longtail import load_images
        >>> data = LongTailed.cut(load_images("digits"), 20, validation_per_class=10)
        >>> summary({"ce": Run([{"seconds": 1.5}], Scores(90.0, 95.0, 90.0, 85.0, (), 0.3, 2.0))}, data).splitlines()[3]
        'ce    90.00   95.00   90.00   85.00     1.50'
    """
    rows = {
        name: {column: getattr(run.scores, column) for column in _COLUMNS} | {"seconds": run.seconds}
        for name, run in runs.items()
    }
    return (
        f"Test accuracy (%) after the last epoch, on {data.name}\n\n{table(rows)}\n\n"
        f"{group_classes(data.counts).rule}; seconds: training alone"
    )


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A plain-text table of numbers, one row per name.

    Args:
        rows: name -> column -> number; all rows with the same columns.

    Returns:
        Its lines, the header first.

    Examples:
        >>> print(table({"ce": {"overall": 80.0, "few": 61.234}, "bikd": {"overall": 82.1, "few": 70.0}}))
              overall     few
        ce      80.00   61.23
        bikd    82.10   70.00
    """
    columns = list(next(iter(rows.values()), {}))
    first = max(map(len, rows), default=0)
    widths = {column: max(len(column), 6) for column in columns}
    lines = [" " * first + "".join(f"  {column:>{widths[column]}}" for column in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<{first}}" + "".join(f"  {row[column]:>{widths[column]}.2f}" for column in columns))
    return "\n".join(lines)
