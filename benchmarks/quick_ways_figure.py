"""The figure of `quick_ways.py`: what each way costs and how far off it is, one panel a case."""

import statistics
from pathlib import Path

from benchmarks.common.numbers import Content, entries, find, per_iteration
from benchmarks.common.quick import WAYS
from metakd.monitor.plots._drawing import MARKERS, TERMS, new_figure

STYLES = {name: (TERMS[i % len(TERMS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(WAYS)}


def draw(content: Content, path: Path) -> None:
    """Draw every way that was measured; hollow marks are at the start, full ones later."""
    cases, points = entries(content, "case"), sorted(entries(content, "after"))
    size = (max(1.5 + 3.6 * len(cases), 7.5), 4.6)
    title = f"Quick ways to a hypergradient (hollow: at the start; full: after {points[-1]} plain iterations)"
    figure, (panels,) = new_figure(1, len(cases), size, title, sharey=True)
    for case, panel in zip(cases, panels, strict=True):
        for name, (colour, marker) in STYLES.items():
            times = per_iteration(content, case, name)
            for after in points:
                errors = find(content, kind="errors", case=case, after=after).get("errors", {}).get(name)
                if times and errors:
                    face = "none" if after < points[-1] else colour
                    at = statistics.median(times), statistics.mean(errors)
                    panel.scatter(*at, s=60, marker=marker, edgecolors=colour, facecolors=face, label=name)
        if times := per_iteration(content, case, "exact"):
            panel.axvline(
                statistics.median(times), color=STYLES["exact"][0], linestyle="--", linewidth=0.9, label="exact"
            )
        panel.set(title=case, xlabel="time of an iteration (plain iterations)", yscale="log")
        panel.set_xlim(left=1)
    panels[0].set_ylabel("relative error of the hypergradient")
    marks = {label: mark for mark, label in zip(*panels[0].get_legend_handles_labels(), strict=True)}
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
