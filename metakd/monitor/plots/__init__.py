"""Figures of what a balancer learns: by class, over time, by loss.

Each function returns a matplotlib `Figure` drawn without pyplot, so it needs no display and keeps no global state. It
needs the extra `plots` (matplotlib), which is imported when a figure is drawn.

In all functions, `axes` are your own axes to draw in, as many as the function would create; `path` is a file to write
the figure to, in the format of its suffix; `title` stands above the figure.
"""

from metakd.monitor.plots.by_class import influence_by_class, weights_by_class
from metakd.monitor.plots.by_loss import weights_by_loss
from metakd.monitor.plots.over_time import influence_over_time, meta_loss_over_time, terms_over_time, weights_over_time

__all__ = [
    "influence_by_class",
    "influence_over_time",
    "meta_loss_over_time",
    "terms_over_time",
    "weights_by_class",
    "weights_by_loss",
    "weights_over_time",
]
