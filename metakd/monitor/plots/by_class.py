"""Weights and influence by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.monitor.history import History
from metakd.monitor.plots._drawing import (
    INFLUENCE,
    MARKERS,
    TERMS,
    draw_by_class,
    draw_counts,
    finish,
    name_classes,
    new_figure,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def weights_by_class(
    weights: History | Tensor,
    *,
    terms: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    last: float = 0.1,
    by: str | None = None,
    title: str | None = "Learned weights by {by}",
    axes: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the mean weight of each term by class, or by source or any other group, below its training samples.

    Args:
        weights: a history with classes, or (C, M) mean weights.
        terms: names of the M terms; default the history's.
        classes: names of the C classes; default their numbers.
        counts: training samples of each class; not drawn in your own `axes`.
        last: the share of the history's last steps to average.
        by: what the classes are, such as "source"; default what the history says.
        title: above the figure.
        axes: to draw in.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: numbers and names do not fit, or matplotlib is missing.

    Examples:
        >>> figure = weights_by_class(torch.tensor([[0.2, 0.4], [0.9, 0.5]]), terms=["hard", "soft"])
        >>> print(*(line.get_label() for line in figure.axes[0].get_lines()), sep=", ")
        hard term, soft term
    """
    figure, panel, means = _by_class(weights, "weights", terms, classes, counts, last, by, title, axes)
    low, high = float(means.nan_to_num(torch.inf).min()), float(means.nan_to_num(-torch.inf).max())
    margin = max(0.12 * (high - low), 0.02)
    panel.set(ylabel="mean learned weight", ylim=(low - margin, high + margin))
    return finish(figure, panel, path, own=axes is not None)


def influence_by_class(
    influence: History | Tensor,
    *,
    terms: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    last: float = 0.1,
    by: str | None = None,
    title: str | None = "Influence on the meta loss by {by}",
    axes: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    r"""Draw the mean influence of each term by class: below zero, more weight would lower the meta loss.

    Args:
        influence: a history with classes, or (C, M) means.
        terms: names of the M terms; default the history's.
        classes: names of the C classes; default their numbers.
        counts: training samples of each class; not drawn in your own `axes`.
        last: the share of the history's last steps to average.
        by: what the classes are, such as "source"; default what the history says.
        title: above the figure.
        axes: to draw in.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: numbers and names do not fit, or matplotlib is missing.

    Examples:
        >>> figure = influence_by_class(torch.tensor([[-0.2], [0.1]]), terms=["hard"], classes=["ant", "bee"])
        >>> figure.axes[0].get_ylabel()
        'mean influence on the meta loss\n(below 0: more weight helps)'
    """
    figure, panel, _ = _by_class(influence, "influence", terms, classes, counts, last, by, title, axes)
    panel.axhline(0, color="#777777", linewidth=0.8)
    panel.set_ylabel(INFLUENCE)
    return finish(figure, panel, path, own=axes is not None)


def _by_class(
    values: History | Tensor,
    quantity: str,
    terms: Sequence[str] | None,
    classes: Sequence[str] | None,
    counts: Sequence[int] | None,
    last: float,
    by: str | None,
    title: str | None,
    axes: Axes | None,
) -> tuple[Figure, Axes, Tensor]:
    """Draw one line per term over the classes; also return the numbers drawn."""
    if isinstance(values, History):
        by, terms, values = by or values.by, terms or values.terms, values.by_class(quantity, last=last)
    by = by or "class"
    title = title and title.replace("{by}", by)
    means, names = torch.as_tensor(values).detach().cpu(), list(terms or ())
    labels = list(classes or map(str, range(len(means))))
    sizes = {"terms": len(names), "classes": len(labels), "counts": len(means) if counts is None else len(counts)}
    known = int(means.isfinite().sum())
    if not known or list(means.shape) * 2 != [sizes[key] for key in ("classes", "terms", "counts", "terms")]:
        raise MetaKDError(
            f"{quantity} by class needs numbers of shape (classes, terms), got {tuple(means.shape)}, {known} of them "
            f"finite, with {sizes}; pass one name per class and term and one count per class, and add steps to a "
            "History first"
        )
    if counts is None or axes is not None:
        figure, (panel,) = panels(axes, 1, (9.5, 4.2), title)
    else:
        figure, grid = new_figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
        draw_counts(grid[0][0], counts)
        panel = grid[1][0]
    for k, term in enumerate(names):
        column = means[:, k].tolist()
        draw_by_class(panel, column, f"{term} term", TERMS[k % len(TERMS)], MARKERS[k % len(MARKERS)], "-")
    tail = counts is not None and list(counts) == sorted(counts, reverse=True)
    name_classes(panel, labels, f"{by}, from head to tail" if tail and by == "class" else by)
    return figure, panel, means
