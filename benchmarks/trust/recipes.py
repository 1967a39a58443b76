"""What is tried in each setting: rows of the table, each with the variants among which validation samples choose."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Attributes:
        weights: how training samples are weighted: "equal", "none" (meta samples alone), "random" (groups, or classes),
            "agreement" (samples, or groups, with whose labels a network trained on the meta samples agrees most),
            "trimmed" (the smaller losses of a batch), "oracle" (right labels alone), "confident" (the surest teacher),
            "table", "samples", "classes" (learned tables), "gates" (by group and loss), "mwn", "l2rw".
        by: the column of groups, "group" or "cell"; "" for single samples.
        term: "ce", "gce", "forward" (GLC), "forward learned", "teachers", "stacked", "stacked learned".
        q: of generalised cross-entropy.
        meta: weight of the meta samples among the training samples; None without them.
        scale: of the training samples' weights.
        keep: share of groups or samples that is kept.
        faster: factor of the student's learning rate.
        draw: number of a random mixture.
        rate: of the table's Adam.
        start: of a table, "equal" or "agreement"; of agreement, "agreement" for a second round, judged by the first
            round's student; of gates, "table" for the losses of a student of a learned table.
        folds: of the meta set; with 2, a half is trained on and the other judges, in turns.
        every: n-th call takes a hypergradient.
        controls: whether students are trained with the final weights fixed, permuted and as their mean, too.
    """

    weights: str = "equal"
    by: str = ""
    term: str = "ce"
    q: float = 0.7
    meta: float | None = None
    scale: float = 1.0
    keep: float = 1.0
    faster: float = 1.0
    draw: int = 0
    rate: float = 0.1
    start: str = "equal"
    folds: int = 1
    every: int = 1
    controls: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


ORACLE = "oracle + meta"
LEARNED = {"gates", "table", "samples", "classes", "teachers", "mwn", "l2rw"}
Rows = dict[str, list[Recipe]]


def scaled(recipe: Recipe) -> list[Recipe]:
    """A recipe with training and meta samples at 1, and with weights 2 and 0.3, the ends of what a table may learn."""
    return [recipe, replace(recipe, scale=2.0, meta=0.3)]


def rows_of(setting: str, *, few: bool = False) -> Rows:
    """Row of the table -> its variants; with `few` the main rows of a setting with labels."""
    if few:
        return main_rows(setting)
    return of_teachers() if setting == "teachers" else of_labels(setting)


def main_rows(setting: str) -> Rows:
    """The rows that matter most where a run is dear; every row that can has the long step among its variants."""
    every, plus = of_labels(setting), Recipe(meta=1.0)
    kept = [r for r in every["agreement + meta"] if r.scale == 2.0 and r.keep < 0.7]
    return {
        "CE": [Recipe()],
        "meta images alone": every["meta images alone"][:1],
        "CE + meta": scaled(plus),
        "GCE": every["GCE"],
        "GCE + meta": every["GCE + meta"][:3],
        "trimming + meta": every["trimming + meta"][1::2],
        "agreement + meta": kept,
        "agreement twice + meta": every["agreement twice + meta"][::3],
        "learned table": every["learned table"],
        "learned table + meta": every["learned table + meta"],
        ORACLE: every[ORACLE],
    }


def of_labels(setting: str) -> Rows:
    """The rows of a setting with labels."""
    by = {"sources": ["group"], "annotators": ["cell", "group"]}.get(setting, [""])
    plus, kept = Recipe(meta=1.0), (0.3, 0.4, 0.5, 0.6, 0.7)
    trusted = [replace(plus, weights="agreement", by=by[0], keep=k) for k in kept]
    rows: Rows = {
        "CE": [Recipe()],
        "meta images alone": [replace(plus, weights="none", faster=f) for f in (1.0, 0.3)],
        "CE + meta": [plus],
        "grid of fixed weights + meta": [
            *scaled(plus), *(replace(plus, scale=s) for s in (0.3, 0.1)), replace(plus, faster=0.3)
        ],
        "random search + meta": [replace(plus, weights="random", by=by[-1], draw=k) for k in range(8)],
        "GCE": [Recipe(term="gce"), Recipe(term="gce", faster=3.0)],
        "GCE + meta": [
            replace(plus, term="gce"),
            *(replace(r, term="gce", faster=3.0) for r in scaled(plus)),
            replace(plus, term="gce", q=1.0, faster=3.0),
        ],
        "trimming + meta": [
            *(replace(plus, weights="trimmed", keep=k) for k in (0.3, 0.5, 0.7)),
            replace(plus, weights="trimmed", keep=0.6, scale=2.0, meta=0.3),
        ],
        "GLC + meta": [replace(r, term="forward") for r in scaled(plus)],
        "agreement + meta": [
            *(r for t in trusted for r in scaled(t)),
            *(replace(plus, weights="agreement", by=b, keep=k) for b in by[1:] for k in (0.3, 0.6)),
        ],
        "agreement twice + meta": [
            replace(plus, weights="agreement", by=by[0], start="agreement", keep=k, scale=2.0, meta=0.3)
            for k in (0.3, 0.4, 0.5, 0.6)
        ],
        "Meta-Weight-Net": [Recipe(weights="mwn")],
        "Meta-Weight-Net + meta": [replace(plus, weights="mwn")],
        "Learning to Reweight": [Recipe(weights="l2rw")],
        "Learning to Reweight + meta": [replace(plus, weights="l2rw")],
        ORACLE: [replace(r, weights="oracle") for r in scaled(plus)],
    }  # fmt: skip
    table = Recipe(weights="table", by=by[0]) if by[0] else Recipe(weights="samples")
    among = [replace(table, meta=0.3, controls=True), replace(table, meta=1.0)]
    rows["learned table"] = [table]
    rows["learned table + meta"] = among[:1]
    rows["learned table + meta, varied"] = [*among[1:], *(replace(among[1], by=b, meta=0.3) for b in by[1:])]
    if by[0]:
        rows["learned table from agreement + meta"] = [replace(table, meta=0.3, start="agreement")]
    else:
        rows["learned table of GCE + meta"] = [replace(table, meta=0.3, term="gce", faster=3.0)]
    rows["learned, second look + meta"] = [Recipe(weights="gates", by=by[-1], meta=0.3, start="table")]
    classes = Recipe(weights="classes", term="forward learned", meta=0.3)
    rows["learned transition + meta"] = [classes] if by[0] else [classes, replace(classes, meta=1.0)]
    return rows


def of_teachers() -> Rows:
    """The rows of the setting with teachers and without labels."""
    plus = Recipe(term="teachers", meta=1.0)
    return {
        "KD": [replace(plus, meta=None)],
        "meta images alone": [Recipe(weights="none", meta=1.0, faster=f) for f in (1.0, 0.3)],
        "KD + meta": [plus],
        "grid of fixed weights + meta": [replace(plus, scale=s, faster=f) for s in (1.0, 0.3, 0.1) for f in (1.0, 0.3)],
        "random search + meta": [replace(plus, weights="random", draw=k) for k in range(8)],
        "surest teacher + meta": [replace(plus, weights="confident", scale=s) for s in (1.0, 0.3)],
        "agreement + meta": [
            replace(plus, weights="agreement", scale=s, keep=k) for s in (1.0, 0.3) for k in (1.0, 0.5)
        ],
        "stacking + meta": [replace(plus, term="stacked", scale=s) for s in (1.0, 0.3)],
        ORACLE: [replace(plus, weights="oracle", scale=s) for s in (1.0, 0.3)],
        "learned table": [replace(plus, weights="teachers", meta=None)],
        "learned table + meta": [replace(plus, weights="teachers", meta=0.3, controls=True)],
        "learned table + meta, varied": [replace(plus, weights="teachers")],
        "learned stacking + meta": [replace(plus, term="stacked learned", meta=m, rate=0.01) for m in (0.3, 1.0)],
    }
