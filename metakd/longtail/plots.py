"""Figures of a run. Drawn without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from metakd.errors import MetaKDError
from metakd.longtail.learned import LearnedWeights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision. One colour a method in all figures.
_METHODS = {
    "ce": ("CE", "#E69F00", "o", ":"),
    "kd": ("KD", "#0072B2", "s", "--"),
    "bskd": ("balanced-softmax KD", "#009E73", "^", "-."),
    "bikd": ("BiKD", "#D55E00", "D", "-"),
}
_SPARE = ("#56B4E9", "#CC79A7", "#000000", "#999999")
_TERMS = ("#000000", "#CC79A7", "#56B4E9", "#009E73")
_COUNTS = "#BBBBBB"


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, title: str) -> None:
    """Draw training loss, test loss and test accuracy over the epochs, one line a method.

    Args:
        histories: method -> one entry an epoch with ``train_loss``, ``test_loss`` and ``test_accuracy``.
        path: the picture to write.
        title: above the figure.
    """
    figure, axes = _figure(1, 3, (11, 4), title)
    panels = (
        ("train_loss", "training loss (as weighted)"),
        ("test_loss", "test cross-entropy (nats)"),
        ("test_accuracy", "test accuracy (%)"),
    )
    for panel, (key, label) in zip(axes[0], panels, strict=True):
        for i, (method, history) in enumerate(histories.items()):
            name, colour, _, dash = _style(method, i)
            epochs = [entry["epoch"] for entry in history if key in entry]
            values = [entry[key] for entry in history if key in entry]
            marker = "o" if len(epochs) == 1 else ""
            panel.plot(epochs, values, dash, marker=marker, color=colour, label=name, linewidth=1.8)
        panel.set(xlabel="epoch", ylabel=label)
        if key != "test_accuracy":
            panel.set_yscale("log")
            _plain_log_ticks(panel)
    _finish(figure, axes[0][0], path)


def class_accuracy(
    accuracy: Mapping[str, Sequence[float]], counts: Sequence[int], classes: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw the test accuracy of every class by method, below the number of its training images.

    Args:
        accuracy: method -> accuracy of each class in percent.
        counts: training images of each class.
        classes: names of the classes.
        path: the picture to write.
        title: above the figure.
    """
    figure, axes = _figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
    _draw_counts(axes[0][0], counts)
    panel = axes[1][0]
    for i, (method, values) in enumerate(accuracy.items()):
        name, colour, marker, dash = _style(method, i)
        _draw_by_class(panel, values, name, colour, marker, dash)
    panel.set(ylabel="test accuracy (%)", ylim=(-3, 103))
    _name_classes(panel, classes)
    _finish(figure, panel, path)


def weights_by_class(
    learned: LearnedWeights, counts: Sequence[int], classes: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw the mean learned weight of each term by class, below the number of the class's training images.

    Args:
        learned: from `learned_weights`.
        counts: training images of each class.
        classes: names of the classes.
        path: the picture to write.
        title: above the figure.
    """
    figure, axes = _figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
    _draw_counts(axes[0][0], counts)
    panel = axes[1][0]
    means = learned.by_class(len(counts))
    for k, term in enumerate(learned.terms):
        _draw_by_class(panel, means[:, k].tolist(), f"{term} term", _TERMS[k % 4], "osD^"[k % 4], "-")
    low, high = float(means.min()), float(means.max())
    margin = max(0.12 * (high - low), 0.02)
    panel.set(ylabel="mean learned weight", ylim=(low - margin, high + margin))
    _name_classes(panel, classes)
    _finish(figure, panel, path)


def weight_surface(learned: LearnedWeights, path: Path, *, title: str) -> None:
    """Draw each term's weight as a function of the losses of student and teacher, with the training images as dots.

    Args:
        learned: from `learned_weights`.
        path: the picture to write.
        title: above the figure.
    """
    terms = len(learned.terms)
    figure, axes = _figure(1, terms, (1.0 + 4.3 * terms, 4.5), title, sharey=True)
    low, high = float(learned.surface.min()), float(learned.surface.max())
    shown = torch.randperm(len(learned.losses), generator=torch.Generator().manual_seed(0))[:1500]
    student, teacher = learned.losses[shown].T.tolist()
    for k, panel in enumerate(axes[0]):
        mesh = panel.pcolormesh(
            learned.axes[:, 0].tolist(),
            learned.axes[:, 1].tolist(),
            learned.surface[:, :, k].T.tolist(),
            cmap="viridis",
            vmin=low,
            vmax=max(high, low + 1e-3),
            shading="gouraud",
        )
        panel.scatter(student, teacher, s=5, color="white", edgecolors="black", linewidths=0.3, alpha=0.7, clip_on=True)
        panel.set(
            xlabel="student's cross-entropy (nats)",
            title=f"weight of the {learned.terms[k]} term",
            xlim=(0, float(learned.axes[-1, 0])),
            ylim=(0, float(learned.axes[-1, 1])),
        )
        panel.grid(False)
    axes[0][0].set_ylabel("teacher's cross-entropy (nats)")
    figure.colorbar(mesh, ax=list(axes[0]), label="weight", pad=0.02)
    figure.savefig(path, dpi=150)


def _figure(
    rows: int, columns: int, size: tuple[float, float], title: str, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetaKDError(
            f"figures are drawn by matplotlib, which could not be imported ({error}); "
            'install it with `pip install "metakd[examples]"`'
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(True, color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def _style(method: str, position: int) -> tuple[str, str, str, str]:
    return _METHODS.get(method, (method, _SPARE[position % len(_SPARE)], "v", "-"))


def _finish(figure: Figure, labelled: Axes, path: Path) -> None:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), frameon=False)
    figure.savefig(path, dpi=150)


def _draw_counts(panel: Axes, counts: Sequence[int]) -> None:
    bars = panel.bar(range(len(counts)), counts, color=_COUNTS)
    panel.set(ylabel="training images", yscale="log", ylim=(max(0.5, min(counts) / 2), max(counts) * 3))
    _plain_log_ticks(panel)
    if len(counts) <= 20:
        panel.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=8)
    panel.grid(False, axis="x")


def _draw_by_class(panel: Axes, values: Sequence[float], name: str, colour: str, marker: str, dash: str) -> None:
    positions = range(len(values))
    if len(values) <= 20:
        panel.plot(positions, values, dash, marker=marker, color=colour, label=name, markersize=6, linewidth=1.6)
        return
    panel.plot(positions, values, linestyle="", marker=marker, color=colour, markersize=3, alpha=0.35)
    window = 2 * (len(values) // 24) + 1  # so many classes are read by their running mean
    padded = F.pad(torch.tensor(values).view(1, 1, -1), (window // 2, window // 2), mode="replicate")
    panel.plot(positions, F.avg_pool1d(padded, window, 1).flatten().tolist(), dash, color=colour, label=name, linewidth=2)


def _name_classes(panel: Axes, classes: Sequence[str]) -> None:
    if len(classes) <= 20:
        long = max(map(len, classes)) > 3
        panel.set_xticks(range(len(classes)), classes, rotation=30 if long else 0, ha="right" if long else "center")
        panel.set_xlabel("class, from head to tail")
    else:
        panel.set_xlabel("class, from head to tail (lines: running mean)")


def _plain_log_ticks(panel: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())
