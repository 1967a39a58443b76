"""The learned weights of the sources against their shares of right labels."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.trust.chosen import Row


def draw(rows: dict[str, Row], path: Path) -> Path | None:
    """A panel for each setting with groups; nothing without any."""
    rows = {setting: row for setting, row in rows.items() if row.of("by group")}
    if not rows:
        return None
    figure = Figure(figsize=(0.4 + 4.4 * len(rows), 3.6), layout="constrained")
    for panel, (setting, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        for cell, marker in zip(row.cells, "osD^v", strict=False):
            right = [100 * share for share in cell["right by group"]]
            panel.scatter(right, cell["by group"], marker=marker, alpha=0.6, label=f"seed {cell['seed']}")
        panel.set(title=setting, xlabel="right labels (%)", ylabel="mean learned weight", ylim=(-0.05, 2.05))
        panel.legend(loc="upper left")
    figure.savefig(path, dpi=100)
    return path
