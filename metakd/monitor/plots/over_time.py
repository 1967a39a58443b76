"""Weights, influence and the meta loss over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metakd.errors import MetaKDError
from metakd.monitor.history import History
from metakd.monitor.plots._drawing import GROUPS, INFLUENCE, MARKERS, TERMS, finish, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Groups = Mapping[str, Sequence[int]]


def weights_over_time(
    history: History,
    *,
    groups: Groups | None = None,
    title: str | None = "Learned weights over time",
    axes: Axes | Sequence[Axes] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the mean weight of each term over the steps.

    The shade is one standard deviation between samples to either side. No shade means that the weight model gives all
    samples the same weight.

    Args:
        history: of the training.
        groups: name -> classes, for one panel per term with one line per group; for one line per source,
            `{f"source {s}": [s] for s in range(20)}`.
        title: above the figure.
        axes: to draw in; with groups one per term.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: the history is empty or lacks the classes, or matplotlib is missing.

    Examples:
        >>> import torch
        >>> from metakd import Report
        >>> history = History(["hard", "soft"])
        >>> history.add(Report(losses=torch.ones(4, 2), weights=torch.rand(4, 2)))
        >>> weights_over_time(history).axes[0].get_xlabel()
        'step'
    """
    return _over_time(history, "weights", "weight (shade: spread of samples)", groups, title, axes, path)


def influence_over_time(
    history: History,
    *,
    groups: Groups | None = None,
    title: str | None = "Influence on the meta loss over time",
    axes: Axes | Sequence[Axes] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the mean influence of each term over the steps: below zero, more weight would lower the meta loss.

    Args:
        history: of the training.
        groups: name -> classes, for one panel per term with one line per group.
        title: above the figure.
        axes: to draw in; with groups one per term.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: no step of the history has an influence, the history lacks the classes, or matplotlib is missing.

    Examples:
        >>> import torch
        >>> from metakd import Report
        >>> history = History(["hard"])
        >>> history.add(Report(torch.ones(4, 1), torch.ones(4, 1), influence=torch.full((4, 1), -0.5)))
        >>> influence_over_time(history).axes[0].get_lines()[0].get_ydata().tolist()
        [-0.5]
    """
    return _over_time(history, "influence", INFLUENCE, groups, title, axes, path)


def meta_loss_over_time(
    history: History,
    *,
    title: str | None = "What the weight model learns from",
    axes: Sequence[Axes] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the meta loss after the lookahead step and the norm of the hypergradient over the steps.

    Args:
        history: of the training.
        title: above the figure.
        axes: two, to draw in.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: no step of the history has a hypergradient, or matplotlib is missing.

    Examples:
        >>> import torch
        >>> from metakd import Report
        >>> history, one = History(["hard"]), torch.ones(4, 1)
        >>> history.add(Report(one, one, meta_loss=torch.tensor(0.7), hypergradient_norm=torch.tensor(0.1)))
        >>> print(*(panel.get_ylabel() for panel in meta_loss_over_time(history).axes), sep=", ")
        meta loss, norm of the hypergradient
    """
    figure, grid = panels(axes, 2, (9.5, 3.6), title)
    for panel, name, label in zip(grid, ("meta_loss", "hypergradient_norm"), _CALL_LABELS, strict=True):
        _line(panel, history, name, history.over_time(name), color="#0072B2", linewidth=1.6)
        panel.set(xlabel="step", ylabel=label, xlim=(0, history.steps + 1))
    grid[1].set_yscale("log")
    return finish(figure, grid[0], path)


def terms_over_time(
    history: History,
    *,
    title: str | None = "Learned terms over time",
    axes: Sequence[Axes] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the terms' own parameters over the steps: one panel for each, with one line per entry.

    Args:
        history: of the training.
        title: above the figure.
        axes: to draw in, one for each parameter.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: no report of the history had a term with parameters of its own, or matplotlib is missing.

    Examples:
        >>> import torch
        >>> from metakd import Report
        >>> history, one = History(["hard"]), torch.ones(4, 1)
        >>> history.add(Report(one, one, term_parameters={"terms.hard.offset": torch.tensor([0.5, -0.5])}))
        >>> [line.get_ydata().tolist() for line in terms_over_time(history).axes[0].get_lines()]
        [[0.5], [-0.5]]
    """
    if not history.learned:
        raise MetaKDError(
            "the history has no term with parameters of its own to draw; add reports of a balancer that learns terms"
        )
    figure, grid = panels(axes, len(history.learned), (1.5 + 4.0 * len(history.learned), 4.0), title)
    for panel, name in zip(grid, history.learned, strict=True):
        entries = history.over_time(name).reshape(len(history.at), -1).unbind(1)
        for i, values in enumerate(entries):
            style: dict[str, Any] = {"label": str(i)} if len(entries) <= _LISTED else {}
            style |= {"color": GROUPS[i % len(GROUPS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.2}
            _line(panel, history, name, values, **style)
        panel.set(xlabel="step", ylabel=name.removeprefix("terms."), xlim=(0, history.steps + 1))
    return finish(figure, grid[0], path, own=axes is not None)


_LISTED = 12  # a legend of more entries would hide the figure
_CALL_LABELS = ("meta loss", "norm of the hypergradient")


def _over_time(
    history: History,
    quantity: str,
    label: str,
    groups: Groups | None,
    title: str | None,
    axes: Axes | Sequence[Axes] | None,
    path: str | Path | None,
) -> Figure:
    terms = history.terms
    count = 1 if groups is None else len(terms)
    size = (9.5, 4.4) if count == 1 else (1.5 + 4.0 * count, 4.2)
    options = {} if axes is not None else {"sharey": True}
    figure, grid = panels(axes, count, size, title, **options)
    for k, term in enumerate(terms):
        panel = grid[k % count]
        lines = {f"{term} term": None} if groups is None else groups
        for i, (name, classes) in enumerate(lines.items()):
            palette, place = (TERMS, k) if groups is None else (GROUPS, i)
            style = {"color": palette[place % len(palette)], "marker": MARKERS[place % len(MARKERS)]}
            spread = history.over_time("spread", classes)[:, k] if quantity == "weights" else None
            means = history.over_time(quantity, classes)[:, k]
            _line(panel, history, quantity, means, spread, label=name, linewidth=1.6, **style)
        if groups is not None:
            panel.set_title(f"{term} term")
        if quantity == "influence":
            panel.axhline(0, color="#777777", linewidth=0.8)
        panel.set(xlabel="step", xlim=(0, history.steps + 1))
    grid[0].set_ylabel(label)
    return finish(figure, grid[0], path, own=axes is not None)


def _line(panel: Axes, history: History, name: str, values: Tensor, spread: Tensor | None = None, **style: Any) -> None:
    """Draw one line through the windows that have a value, with a few markers to tell overlapping lines apart."""
    known = values.isfinite()
    if not bool(known.any()):
        raise MetaKDError(
            f"no step of the history has {name!r} to draw; call history.add(balancer.report) at every step, and pass "
            "meta batches to the balancer"
        )
    steps, values = history.at[known].numpy(), values[known]
    panel.plot(steps, values.numpy(), markevery=max(len(steps) // 8, 1), markersize=5, **style)
    if spread is not None:
        low, high = values - spread[known], values + spread[known]
        panel.fill_between(steps, low.numpy(), high.numpy(), color=style["color"], alpha=0.12, linewidth=0)
