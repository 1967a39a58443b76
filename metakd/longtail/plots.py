"""Figures of a run. Drawn without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from metakd.longtail._drawing import (
    TERMS,
    draw_by_class,
    draw_counts,
    finish,
    name_classes,
    new_figure,
    plain_log_ticks,
    style,
)
from metakd.longtail.learned import LearnedWeights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, title: str) -> Figure:
    """Draw training loss, test loss and test accuracy over the epochs, one line a method.

    Args:
        histories: method -> one entry an epoch with ``train_loss``, ``test_loss`` and ``test_accuracy``.
        path: the picture to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.
    """
    figure, axes = new_figure(1, 3, (11, 4), title)
    panels = (
        ("train_loss", "training loss (as weighted)"),
        ("test_loss", "test cross-entropy (nats)"),
        ("test_accuracy", "test accuracy (%)"),
    )
    for panel, (key, label) in zip(axes[0], panels, strict=True):
        for i, (method, history) in enumerate(histories.items()):
            name, colour, _, dash = style(method, i)
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
    """Draw the test accuracy of every class by method, below the number of its training images.

    Args:
        accuracy: method -> accuracy of each class in percent.
        counts: training images of each class.
        classes: names of the classes.
        path: the picture to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.
    """
    figure, axes = new_figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
    draw_counts(axes[0][0], counts)
    panel = axes[1][0]
    for i, (method, values) in enumerate(accuracy.items()):
        name, colour, marker, dash = style(method, i)
        draw_by_class(panel, values, name, colour, marker, dash)
    panel.set(ylabel="test accuracy (%)", ylim=(-3, 103))
    name_classes(panel, classes)
    return finish(figure, panel, path)


def weights_by_class(
    learned: LearnedWeights, counts: Sequence[int], classes: Sequence[str], path: Path, *, title: str
) -> Figure:
    """Draw the mean learned weight of each term by class, below the number of the class's training images.

    Args:
        learned: from `learned_weights`.
        counts: training images of each class.
        classes: names of the classes.
        path: the picture to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.
    """
    figure, axes = new_figure(2, 1, (9.5, 5.4), title, height_ratios=(1, 2.6), sharex=True)
    draw_counts(axes[0][0], counts)
    panel = axes[1][0]
    means = learned.by_class(len(counts))
    for k, term in enumerate(learned.terms):
        draw_by_class(panel, means[:, k].tolist(), f"{term} term", TERMS[k % 4], "osD^"[k % 4], "-")
    low, high = float(means.min()), float(means.max())
    margin = max(0.12 * (high - low), 0.02)
    panel.set(ylabel="mean learned weight", ylim=(low - margin, high + margin))
    name_classes(panel, classes)
    return finish(figure, panel, path)


def weight_surface(learned: LearnedWeights, path: Path, *, title: str) -> Figure:
    """Draw each term's weight over the losses of student and teacher, with the training images as dots.

    Args:
        learned: from `learned_weights`.
        path: the picture to write.
        title: above the figure.

    Returns:
        The figure, also written to ``path``.
    """
    terms = len(learned.terms)
    figure, axes = new_figure(1, terms, (1.0 + 4.3 * terms, 4.8), title, sharey=True)
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
        panel.scatter(
            student,
            teacher,
            s=7,
            color="white",
            edgecolors="black",
            linewidths=0.4,
            alpha=0.8,
            label="training images",
        )
        panel.set(
            xlabel="student's cross-entropy (nats)",
            title=f"weight of the {learned.terms[k]} term",
            xlim=(0, float(learned.axes[-1, 0])),
            ylim=(0, float(learned.axes[-1, 1])),
        )
        panel.grid(False)
    axes[0][0].set_ylabel("teacher's cross-entropy (nats)")
    figure.colorbar(mesh, ax=list(axes[0]), label="weight", pad=0.02)
    return finish(figure, axes[0][0], path)
