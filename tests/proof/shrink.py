"""The smallest recipe that still shows a fault."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.proof.compose import Recipe


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes that are simpler in one thing."""
    for i in range(len(recipe.stages)):
        if len(recipe.stages) > 1:
            yield replace(recipe, stages=recipe.stages[:i] + recipe.stages[i + 1 :])
    for i, stage in enumerate(recipe.stages):
        for simpler in (
            replace(stage, operation="linear"),
            replace(stage, before=""),
            replace(stage, before=stage.before[-1:]),
            replace(stage, operand="weights"),
        ):
            if simpler != stage:
                yield replace(recipe, stages=(*recipe.stages[:i], simpler, *recipe.stages[i + 1 :]))
    for plain in (
        {"steps": 1},
        {"rule": "sgd"},
        {"end": "plain"},
        {"loss": "mse"},
        {"squashed": False},
        {"size": (4, 3)},
    ):
        if replace(recipe, **plain) != recipe:
            yield replace(recipe, **plain)


def smallest(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """Go down while something simpler fails, too."""
    for simpler in smaller(recipe):
        if simpler.coupled and fails(simpler):
            return smallest(simpler, fails)
    return recipe
