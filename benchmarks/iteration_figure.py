"""The figure of `iteration.py`: bars of time and memory, one row a case."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.loops import METHODS, PERIOD
from benchmarks.common.numbers import Content, entries, memory, per_iteration
from metakd.monitor.plots._drawing import new_figure

# Okabe and Ito's palette.
PLAIN, METAKD, PEERS = "#999999", "#D55E00", "#0072B2"
COLOURS = {
    name: PEERS if name in ("published way", "by hand", "TorchOpt MetaSGD", "higher") else METAKD for name in METHODS
} | {"plain": PLAIN}
LABELS = {name: f"metakd, {name}" for name, colour in COLOURS.items() if colour == METAKD}


def draw(content: Content, path: Path) -> None:
    """Draw every method that was measured."""
    cases = entries(content, "case")
    names = [name for name in METHODS if any(_known(content, case, name) for case in cases)]
    size = (11, 1.0 + len(cases) * (0.8 + 0.34 * len(names)))
    figure, axes = new_figure(len(cases), 2, size, "What a training iteration with learned weights costs", sharey=True)
    places = {name: place for place, name in enumerate(names)}
    for case, (time, megabytes) in zip(cases, axes, strict=True):
        for name, place in places.items():
            for teacher in (False, True):
                found = [1.0] if name == "plain" else per_iteration(content, case, name, teacher=teacher)
                if found:
                    _bar(time, place + 0.4 * teacher, found, f"{statistics.median(found):.2f}", name, light=teacher)
            if (mb := memory(content, case, PERIOD, name)) is not None:
                _bar(megabytes, place + 0.2, [mb], f"{mb:,.0f}", name)
        time.axvline(1, color=PLAIN, linewidth=0.8)
        time.set(title=case, xlabel="time (plain iterations)")
        time.set_yticks([place + 0.2 for place in places.values()], [LABELS.get(name, name) for name in names])
        time.set_ylim(len(names) - 0.2, -0.4)
        megabytes.set(title=case, xlabel="memory of a call (MB)")
        for panel in (time, megabytes):
            panel.margins(x=0.12)
            panel.grid(False, axis="y")
    figure.supxlabel(
        "Hatched: with a teacher's pass in every iteration, plain ones as well. Lines: all rounds.", size=9
    )
    figure.savefig(path, dpi=150)


def _known(content: Content, case: str, name: str) -> bool:
    return name == "plain" or any(per_iteration(content, case, name, teacher=teacher) for teacher in (False, True))


def _bar(panel: Any, place: float, values: list[float], label: str, name: str, light: bool = False) -> None:
    """One bar up to the median, with a line from the smallest to the largest value."""
    middle, height = statistics.median(values), 0.38
    colour = {"edgecolor": COLOURS[name], "facecolor": "white", "hatch": "////"} if light else {"color": COLOURS[name]}
    panel.barh(place, middle, height, linewidth=0.8, **colour)
    panel.plot([min(values), max(values)], [place, place], color="black", linewidth=1.2)
    panel.annotate(label, (max(values), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
