"""Which variant of a row validation samples choose, and which row of several."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.trust.recipes import ORACLE, Recipe, rows_of

SEARCHED = "random search + meta"
"""Every seed draws other mixtures, so that each chooses for itself."""

RECOMMENDED = "learned table + meta"
"""What was recommended before these runs, by trials on other features: a table at Adam 0.1, meta samples at 0.3."""

CELLS = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: of the row.
        recipe: the variant with the best validation accuracy, mean over the seeds.
        cells: its runs, in the order of their seeds.
        seconds: CPU time of all variants, mean over the seeds.
        tried: how many variants there are.
        score: the mean validation accuracy by which it was chosen.
    """

    name: str
    recipe: Recipe
    cells: CELLS
    seconds: float
    tried: int
    score: float

    def of(self, key: str) -> list[float]:
        """A number of each seed."""
        return [cell[key] for cell in self.cells if key in cell]

    def mean(self, key: str) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.of(key))


def rows(cells: CELLS, setting: str, meta: int, *, few: bool = False) -> dict[str, Row]:
    """The rows of a setting and a meta set; with `few` the main ones.

    All of the seeds for which every variant of every row was run; while there are none, each row of the seeds for which
    all its variants were.
    """
    here = [cell for cell in cells if cell["setting"] == setting and cell["meta"] == meta]
    found = {(_frozen(cell["recipe"]), cell["seed"]): cell for cell in here}

    def complete(recipes: Iterable[Recipe]) -> list[int]:
        keys = [_frozen(recipe.settings()) for recipe in recipes]
        return [seed for seed in sorted({cell["seed"] for cell in here}) if all((key, seed) in found for key in keys)]

    wanted = rows_of(setting, few=few)
    of_all = complete(variant for variants in wanted.values() for variant in variants)
    result = {}
    for name, variants in wanted.items():
        if seeds := of_all or complete(variants):
            result[name] = _row(name, variants, [[found[_frozen(v.settings()), s] for s in seeds] for v in variants])
    return result


def _row(name: str, variants: Sequence[Recipe], runs: Sequence[list[Mapping[str, Any]]]) -> Row:
    scores = [statistics.mean(cell["validation"] for cell in of) for of in runs]
    best = max(range(len(runs)), key=scores.__getitem__)
    cells = runs[best]
    if name == SEARCHED:
        cells = [max(of_seed, key=lambda cell: cell["validation"]) for of_seed in zip(*runs, strict=True)]
    seconds = statistics.mean(sum(cell.get("seconds", 0.0) for cell in of_seed) for of_seed in zip(*runs, strict=True))
    return Row(name, variants[best], cells, seconds, len(variants), scores[best])


def _frozen(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(recipe.items(), key=lambda item: item[0]))


def is_ours(name: str) -> bool:
    """Whether a row is metakd's own."""
    return name.startswith("learned")


def best(of: Iterable[Row], key: str | None = None) -> Row | None:
    """The row with the highest mean of some number; or by which validation samples choose."""
    return max(of, key=lambda row: row.mean(key) if key else row.score, default=None)


def rivals(of: Mapping[str, Row]) -> list[Row]:
    """All rows but our own and the oracle."""
    return [row for name, row in of.items() if not is_ours(name) and name != ORACLE]


def ours(of: Mapping[str, Row]) -> list[Row]:
    """Our own rows."""
    return [row for name, row in of.items() if is_ours(name)]


def gains(first: Row, second: Row) -> list[float]:
    """By how much the first has more test accuracy, seed by seed."""
    theirs = {cell["seed"]: cell["test"] for cell in second.cells}
    return [cell["test"] - theirs[cell["seed"]] for cell in first.cells if cell["seed"] in theirs]
