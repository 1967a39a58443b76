"""Every ingredient, by name, and the parts that a recipe makes of them."""

from collections.abc import Iterator

from tests.proof.students import (  # noqa: F401
    caches,
    hard_to_find,
    hooks,
    layers,
    modes,
    outputs,
    parameters,
    registry,
    state,
    terms,
    written,
)
from tests.proof.students.registry import Ingredient, Parts

__all__ = ["INGREDIENTS", "Parts", "walk_parts"]

INGREDIENTS: dict[str, Ingredient] = dict(sorted(registry.INGREDIENTS.items()))  # whichever file came first


def walk_parts(chosen: Iterator[str]) -> Parts:
    """The parts of a recipe, in order."""
    parts = Parts()
    for name in chosen:
        INGREDIENTS[name].add(parts)
    return parts
