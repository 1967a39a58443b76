"""Figures that compare the methods of a run. `metakd.plots` draws what a balancer learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metakd.monitor.history import History
from metakd.monitor.plots._drawing import (
    GROUPS,
    MARKERS,
    draw_by_class,
    draw_counts,
    finish,
    name_classes,
    new_figure,
    plain_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any colour vision; one colour per method in all figures.
STYLES = {
    "ce": ("CE", "#E69F00", "o", ":"),
    "kd": ("KD", "#0072B2", "s", "--"),
    "bskd": ("balanced-softmax KD", "#009E73", "^", "-."),
    "bikd": ("BiKD", "#D55E00", "D", "-"),
    "kd-meta": ("KD + meta images", "#56B4E9", "v", "--"),
    "fixed": ("best fixed mixture", "#009E73", "^", "-."),
    "mean": ("BiKD's mean weights", "#CC79A7", "P", "-."),
    "meta": ("meta images alone", "#999999", "*", ":"),
    "oracle": ("oracle", "#000000", "X", ":"),
}
_SPARE = (("#56B4E9", "v"), ("#CC79A7", "P"), ("#000000", "X"), ("#999999", "*"))


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, title: str) -> Figure:
    """Draw training loss, test loss and test accuracy over the epochs, one line per method.

    Args:
        histories: method -> one entry per epoch with ``train_loss``, ``test_loss`` and ``test_accuracy``.
        path: the file to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.

    Examples:
        >>> import tempfile
        >>> history = [{"epoch": 1, "train_loss": 0.9, "test_loss": 0.8, "test_accuracy": 70.0}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = training_curves({"ce": history}, Path(folder) / "curves.png", title="Training")
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['training loss (as weighted)', 'test cross-entropy (nats)', 'test accuracy (%)']
    """
    figure, axes = new_figure(1, 3, (11, 4), title)
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
            plain_log_ticks(panel)
    return finish(figure, axes[0][0], path)


def class_accuracy(
    accuracy: Mapping[str, Sequence[float]],
    counts: Sequence[int],
    classes: Sequence[str],
    path: Path,
    *,
    title: str,
) -> Figure:
    """Draw the test accuracy of every class by method, below the class's number of training images.

    Args:
        accuracy: method -> accuracy of each class in percent.
        counts: training images of each class.
        classes: names of the classes.
        path: the file to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "accuracy.png"
        ...     figure = class_accuracy({"kd": [90.0, 70.0]}, [40, 5], ["cat", "dog"], path, title="Accuracy")
        >>> [line.get_label() for line in figure.axes[1].get_lines()]
        ['KD']
    """
    figure, axes = new_figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
    draw_counts(axes[0][0], counts)
    panel = axes[1][0]
    for i, (method, values) in enumerate(accuracy.items()):
        name, colour, marker, dash = _style(method, i)
        draw_by_class(panel, values, name, colour, marker, dash)
    panel.set(ylabel="test accuracy (%)", ylim=(-3, 103))
    name_classes(panel, classes, "class, from head to tail")
    return finish(figure, panel, path)


def weights_by_source(history: History, kinds: Sequence[str], path: Path, *, title: str) -> Figure:
    """Draw the weights of every source over the steps: a panel for each term, a colour for each kind of source.

    Args:
        history: of the weights, by source.
        kinds: what each source is, such as "right" or "always wrong".
        path: the file to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from metakd import Report
        >>> history = History(["hard"], classes=2, by="source")
        >>> history.add(Report(torch.ones(2, 1), torch.tensor([[0.9], [0.1]])), torch.tensor([0, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = weights_by_source(history, ["right", "wrong"], Path(folder) / "weights.png", title="Weights")
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['right', 'wrong']
    """
    names = list(dict.fromkeys(kinds))
    figure, axes = new_figure(1, len(history.terms), (1.5 + 4.5 * len(history.terms), 4.4), title, sharey=True)
    for source, kind in enumerate(kinds):
        weights, place = history.over_time("weights", [source]), names.index(kind)
        for k, (panel, term) in enumerate(zip(axes[0], history.terms, strict=True)):
            known = weights[:, k].isfinite()
            panel.plot(
                history.at[known],
                weights[known, k],
                color=GROUPS[place % len(GROUPS)],
                marker=MARKERS[place % len(MARKERS)],
                markevery=max(int(known.sum()) // 8, 1),
                markersize=4,
                linewidth=1.4,
                label=kind if kinds.index(kind) == source else f"_{source}",
            )
            panel.set(xlabel="step", title=f"{term} term", xlim=(0, history.steps + 1))
    axes[0][0].set_ylabel("weight of each source")
    return finish(figure, axes[0][0], path)


def _style(method: str, position: int) -> tuple[str, str, str, str]:
    """A method's name, colour, marker and dash."""
    colour, marker = _SPARE[position % len(_SPARE)]
    return STYLES.get(method, (method, colour, marker, "-"))
