"""Weights as a function of a sample's losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metakd._virtual.teacher import in_eval_mode, members
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.monitor.plots._drawing import MARKERS, TERMS, finish, panels
from metakd.weighting.features import own_losses, student_and_teacher

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WeightModel = Callable[[Tensor, Batch], Tensor]
_GRID = 64  # points along each feature


def weights_by_loss(
    model: BilevelLossBalancer | WeightModel,
    samples: Tensor | None = None,
    *,
    terms: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    limits: Sequence[float] | None = None,
    title: str | None = "Learned weights by loss",
    axes: Axes | Sequence[Axes] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw each term's weight over the losses of student and teacher, or over the weight model's one or two features.

    With two features the figure has one map per term, with one feature one line per term. The maps are those of the
    BiKD paper (arXiv 2605.17839).

    Args:
        model: a balancer, or a weight model (features (B, F), batch) -> (B, M) of one or two features.
        samples: (N, F) features of real samples, drawn as dots; `learned_weights` returns them.
        terms: names of the M terms; default the balancer's.
        features: names of the F features; default the names of the balancer's default features.
        limits: the upper end of each feature's axis; by default nearly all samples fit in, or 3 without samples.
        title: above the figure.
        axes: to draw in; with two features one per term.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        MetaKDError: the weight model has more than two or unknown features, or needs more than the features; numbers
            and names do not fit; matplotlib is missing.

    Examples:
        >>> from metakd.weighting import LossMLP
        >>> names = ["student's loss", "teacher's loss"]
        >>> figure = weights_by_loss(LossMLP(2, 2), terms=["hard", "soft"], features=names)
        >>> print(*(panel.get_title() for panel in figure.axes[:2]), sep=", ")
        weight of the hard term, weight of the soft term
    """
    if isinstance(model, BilevelLossBalancer):
        terms = list(model.terms) if terms is None else terms
        features = _names(model) if features is None else features
        model = model.weighting
    width = len(features) if features is not None else samples.shape[1] if samples is not None else 0
    if width not in (1, 2) or (samples is not None and (samples.ndim != 2 or samples.shape[1] != width)):
        raise MetaKDError(
            f"weights are drawn over one or two features, got {width} names and samples of shape "
            f"{None if samples is None else tuple(samples.shape)}; pass features=[...], or for a model of more "
            "features a function of two: lambda x, batch: model(torch.cat([x, others.expand(len(x), -1)], 1), batch)"
        )
    labels = list(features or [f"feature {k + 1}" for k in range(width)])
    if samples is not None:
        samples = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:100_000]].float()
    ends = torch.tensor(limits if limits is not None else _ends(samples, width), dtype=torch.float32)
    grid = torch.linspace(0, 1, _GRID).unsqueeze(1) * ends
    points = grid if width == 1 else torch.cartesian_prod(*grid.T)
    weights = _evaluated(model, points)
    names = list(terms if terms is not None else [f"{k + 1}." for k in range(weights.shape[1])])
    if len(names) != weights.shape[1]:
        raise MetaKDError(
            f"the weight model returns {weights.shape[1]} weights per sample, but the terms are {names}; name each"
        )
    if width == 1:
        figure, (panel,) = panels(axes, 1, (7, 4.2), title)
        _lines(panel, grid[:, 0], weights, names)
        panel.set(xlabel=labels[0], ylabel="weight", xlim=(0, float(ends)))
        return finish(figure, panel, path, own=axes is not None)
    figure, grids = panels(axes, len(names), (1.0 + 4.3 * len(names), 4.8), title)
    _maps(figure, grids, grid, weights.view(_GRID, _GRID, -1), names, samples)
    for panel in grids:
        panel.set(xlabel=labels[0], xlim=(0, float(ends[0])), ylim=(0, float(ends[1])))
    grids[0].set_ylabel(labels[1])
    return finish(figure, grids[0], path, own=axes is not None)


def _names(balancer: BilevelLossBalancer) -> list[str] | None:
    """Names of the default features."""
    if balancer.features is student_and_teacher and members(balancer.teacher) is None:
        return ["student's cross-entropy (nats)", "teacher's cross-entropy (nats)"]
    return [f"loss of the {term} term" for term in balancer.terms] if balancer.features is own_losses else None


def _ends(samples: Tensor | None, width: int) -> list[float]:
    if samples is None:
        return [3.0] * width
    top = torch.quantile(samples, 0.98, dim=0)
    # Without a lower bound, a teacher that has memorised its training samples would leave a flat strip.
    return [float(end) for end in top.clamp_min(0.25 * float(top.max())).clamp_min(0.1)]


@torch.no_grad()
def _evaluated(model: WeightModel, points: Tensor) -> Tensor:
    """The weights at the points, on the CPU."""
    if not isinstance(model, nn.Module):
        return model(points, Batch(points)).float().cpu()
    moved = points.to(next(model.parameters(), points).device)
    with in_eval_mode(model):
        weights: Tensor = model(moved, Batch(moved))
    return weights.float().cpu()


def _lines(panel: Axes, x: Tensor, weights: Tensor, names: Sequence[str]) -> None:
    for k, name in enumerate(names):
        colour, marker = TERMS[k % len(TERMS)], MARKERS[k % len(MARKERS)]
        values = weights[:, k].tolist()
        panel.plot(x.tolist(), values, color=colour, marker=marker, markevery=8, markersize=5, label=f"{name} term")


def _maps(
    figure: Figure, grids: Sequence[Axes], grid: Tensor, surface: Tensor, names: Sequence[str], samples: Tensor | None
) -> None:
    """Draw one map per term on a common colour scale, with the samples as dots."""
    low, high = float(surface.min()), float(surface.max())
    colours: Mapping[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": max(high, low + 1e-3)}
    across, up = grid.T.tolist()
    for k, panel in enumerate(grids):
        mesh = panel.pcolormesh(across, up, surface[:, :, k].T.tolist(), shading="gouraud", **colours)
        if samples is not None:
            dots: Mapping[str, Any] = {"s": 7, "color": "white", "edgecolors": "black", "linewidths": 0.4, "alpha": 0.8}
            panel.scatter(*samples[:1500].T.tolist(), label="training samples", **dots)
        panel.set_title(f"weight of the {names[k]} term")
        panel.grid(False)
    figure.colorbar(mesh, ax=list(grids), label="weight", pad=0.02)
