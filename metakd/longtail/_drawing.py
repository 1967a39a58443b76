"""What the figures share: colours, axes, legends, and panels over the classes."""

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

# Okabe and Ito's palette, told apart with any colour vision. One colour a method in all figures.
_METHODS = {
    "ce": ("CE", "#E69F00", "o", ":"),
    "kd": ("KD", "#0072B2", "s", "--"),
    "bskd": ("balanced-softmax KD", "#009E73", "^", "-."),
    "bikd": ("BiKD", "#D55E00", "D", "-"),
}
_SPARE = ("#56B4E9", "#CC79A7", "#000000", "#999999")
TERMS = ("#000000", "#CC79A7", "#56B4E9", "#009E73")
_COUNTS = "#BBBBBB"


def new_figure(
    rows: int, columns: int, size: tuple[float, float], title: str, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a title and quiet axes."""
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


def style(method: str, position: int) -> tuple[str, str, str, str]:
    """A method's name, colour, marker and dash."""
    return _METHODS.get(method, (method, _SPARE[position % len(_SPARE)], "v", "-"))


def finish(figure: Figure, labelled: Axes, path: Path) -> Figure:
    """Add the legend below the axes and write the file."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), frameon=False)
    figure.savefig(path, dpi=150)
    return figure


def draw_counts(panel: Axes, counts: Sequence[int]) -> None:
    """Bars of training images per class."""
    bars = panel.bar(range(len(counts)), counts, color=_COUNTS)
    panel.set(ylabel="training images", yscale="log", ylim=(max(0.5, min(counts) / 2), max(counts) * 3))
    plain_log_ticks(panel)
    if len(counts) <= 20:
        panel.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=8)
    panel.grid(False, axis="x")


def draw_by_class(panel: Axes, values: Sequence[float], name: str, colour: str, marker: str, dash: str) -> None:
    """One line over the classes; dots and a running mean where there are many."""
    positions = range(len(values))
    if len(values) <= 20:
        panel.plot(positions, values, dash, marker=marker, color=colour, label=name, markersize=6, linewidth=1.6)
        return
    panel.plot(positions, values, linestyle="", marker=marker, color=colour, markersize=3, alpha=0.35)
    window = 2 * (len(values) // 24) + 1  # so many classes are read by their running mean
    padded = F.pad(torch.tensor(values).view(1, 1, -1), (window // 2, window // 2), mode="replicate")
    panel.plot(
        positions,
        F.avg_pool1d(padded, window, 1).flatten().tolist(),
        dash,
        color=colour,
        label=name,
        linewidth=2,
    )


def name_classes(panel: Axes, classes: Sequence[str]) -> None:
    """Label the axis of classes."""
    if len(classes) <= 20:
        long = max(map(len, classes)) > 3
        panel.set_xticks(range(len(classes)), classes, rotation=30 if long else 0, ha="right" if long else "center")
        panel.set_xlabel("class, from head to tail")
    else:
        panel.set_xlabel("class, from head to tail (lines: running mean)")


def plain_log_ticks(panel: Axes) -> None:
    """Ticks at 1, 2, 5, 10, ... in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())
