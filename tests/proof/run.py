"""Run the proof widely: `python -m tests.proof.run 5000 [first seed]`, and read what it found.

Each example is a random recipe; every estimator is right, refuses by name, or is a fault. Faults are printed with the
smallest recipe that shows them; then a table of operations with what happened to the recipes that hold them.
"""

import random
import sys
import warnings
from collections import Counter

import torch

from tests.proof.compose import Recipe, drawn
from tests.proof.shrink import smallest
from tests.proof.verdict import FAULTS, Unfit, Verdict, verdicts

SHOWN = (*FAULTS, "declined", "as torch")


def recipe_of(number: int) -> Recipe:
    """The recipe of a number."""
    chance = random.Random(number)
    while not (recipe := drawn(lambda options: chance.choice(list(options)))).coupled:
        pass
    return recipe


def kind_of(verdict: Verdict) -> tuple[str, str, str]:
    """What makes two faults the same kind: the estimator, the fault, and for errors their first words."""
    words = verdict.words[:50] if verdict.kind in ("raised", "warned", "declined") else ""
    return verdict.estimator.split("(horizon")[0], verdict.kind, words


def faults(recipe: Recipe) -> dict[tuple[str, str, str], Verdict]:
    """The faults of a recipe by their kind."""
    try:
        return {kind_of(verdict): verdict for verdict in verdicts(recipe) if verdict.kind in SHOWN}
    except Exception:
        return {}


class Tally:
    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.by_name: dict[str, Counter[str]] = {}
        self.refusals: dict[str, Counter[str]] = {}
        self.seen: set[tuple[object, ...]] = set()

    def add(self, recipe: Recipe, found: list[Verdict]) -> None:
        explained: set[tuple[str, str, str]] = set()
        for verdict in found:
            self.kinds[verdict.kind] += 1
            for name in recipe.names:
                self.by_name.setdefault(name, Counter())[verdict.kind] += 1
            if verdict.kind == "refused" and "differs from" not in verdict.words:
                self.refusals.setdefault(verdict.words.splitlines()[0][:110], Counter()).update(
                    [verdict.estimator.split("(")[0], *recipe.names]
                )
            elif verdict.kind in SHOWN and kind_of(verdict) not in explained:
                explained |= self._report(recipe, verdict)

    def _report(self, recipe: Recipe, verdict: Verdict) -> set[tuple[str, str, str]]:
        """Print a fault's smallest recipe, the first time that it is met, with all faults of that; returns these."""
        kind = kind_of(verdict)
        least = smallest(recipe, lambda simpler: kind in faults(simpler))
        found = faults(least) or {kind: verdict}
        key = (*sorted(found), *least.names)
        if key not in self.seen:
            self.seen.add(key)
            print(least, f"(seed {recipe.seed})")
            for each in found.values():
                print(f"    {each.kind}: {each.estimator}: {each.words}", flush=True)
        return set(found)

    def print(self) -> None:
        print("\nverdicts:", dict(self.kinds))
        print("\nrefusals, with what stood in the recipes most often:")
        for words, names in sorted(self.refusals.items(), key=lambda item: -item[1].total()):
            print(f"  {words}\n      {names.most_common(8)}")
        print("\nby operation:")
        for name, kinds in sorted(self.by_name.items()):
            print(f"  {name:35} {dict(kinds)}")


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tally, unfit = Tally(), 0
    for number in range(first, first + count):
        recipe = recipe_of(number)
        try:
            tally.add(recipe, verdicts(recipe))
        except Unfit:
            unfit += 1
        except Exception as error:
            print(f"the recipe itself: {type(error).__name__}: {str(error)[:200]}\n    {recipe}", flush=True)
    tally.print()
    print(f"\n{count} examples, {unfit} of them unfit")


if __name__ == "__main__":
    main()
