"""Shared by the figures: colours, axes, legends, and panels over the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from metakd.errors import MetaKDError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    OwnAxes = Axes | Sequence[Axes] | None

# Okabe and Ito's palette, distinguishable with any colour vision.
TERMS = ("#000000", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#E69F00")
GROUPS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^v<>PX"
INFLUENCE = "mean influence on the meta loss\n(below 0: more weight helps)"
_COUNTS = "#BBBBBB"


def new_figure(
    rows: int, columns: int, size: tuple[float, float], title: str | None, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with a title and light axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetaKDError(
            f"figures need matplotlib, which could not be imported ({error}); "
            'install it with `pip install "metakd[plots]"`'
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        _quiet(axis)
    return figure, axes.tolist()


def panels(
    axes: OwnAxes, count: int, size: tuple[float, float], title: str | None, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a row of axes: the user's own if they are as many as needed, or those of a new figure."""
    if axes is None:
        figure, grid = new_figure(1, count, size, title, **options)
        return figure, grid[0]
    own: list[Any] = list(getattr(axes, "flat", axes if isinstance(axes, Sequence) else [axes]))
    if len(own) != count:
        raise MetaKDError(f"this figure has {count} panel(s), but got {len(own)} axes; pass {count}, or none")
    for axis in own:
        _quiet(axis)
    if title:
        own[0].set_title(title)
    return own[0].figure, own


def _quiet(axis: Axes) -> None:
    axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, labelled: Axes, path: str | Path | None, *, own: bool = False) -> Figure:
    """Add the legend, below the figure or inside the user's own axes, and write the file."""
    handles, labels = labelled.get_legend_handles_labels()
    if own and labels:
        labelled.legend(frameon=False, fontsize="small")
    elif labels:
        for columns in range(min(len(labels), 6), 0, -1):
            legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
            if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
                break
            legend.remove()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def draw_counts(panel: Axes, counts: Sequence[int]) -> None:
    """Draw bars of the training samples per class."""
    bars = panel.bar(range(len(counts)), counts, color=_COUNTS)
    panel.set(ylabel="training\nsamples", yscale="log", ylim=(max(0.5, min(counts) / 2), max(counts) * 3))
    plain_log_ticks(panel)
    if len(counts) <= 20:
        panel.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=8)
    panel.grid(False, axis="x")


def draw_by_class(panel: Axes, values: Sequence[float], name: str, colour: str, marker: str, dash: str) -> None:
    """Draw one line over the classes; for more than 20 classes, dots and a running mean."""
    positions = range(len(values))
    if len(values) <= 20:
        panel.plot(positions, values, dash, marker=marker, color=colour, label=name, markersize=6, linewidth=1.6)
        return
    panel.plot(positions, values, linestyle="", marker=marker, color=colour, markersize=3, alpha=0.35)
    window = 2 * (len(values) // 24) + 1
    padded = F.pad(torch.tensor(values).view(1, 1, -1), (window // 2, window // 2), mode="replicate")
    means = padded.unfold(2, window, 1).nanmean(-1).flatten()
    panel.plot(positions, means.tolist(), dash, color=colour, label=name, linewidth=2)


def name_classes(panel: Axes, classes: Sequence[str], axis: str = "class") -> None:
    """Label the axis of classes."""
    if len(classes) <= 20:
        long = max(map(len, classes)) > 3
        panel.set_xticks(range(len(classes)), classes, rotation=30 if long else 0, ha="right" if long else "center")
        panel.set_xlabel(axis)
    else:
        panel.set_xlabel(f"{axis} (lines: running mean)")


def plain_log_ticks(panel: Axes) -> None:
    """Set ticks at 1, 2, 5, 10, ... in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())
