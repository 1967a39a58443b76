"""What is read out of a record: `Record.content`, a command, an environment, settings and cells."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.common.loops import WINDOWS

Content = Mapping[str, Any]


def find(content: Content, **key: Any) -> dict[str, Any]:
    """The cell with these entries, or an empty one."""
    return next((cell for cell in content["cells"] if key.items() <= cell.items()), {})


def entries(content: Content, key: str) -> list[Any]:
    """The values that the cells have for a key, in order of appearance."""
    return list(dict.fromkeys(cell[key] for cell in content["cells"] if key in cell))


def ratios(cell: Mapping[str, Any], name: str, over: str = "plain") -> list[float]:
    """A method's time over another's (of "plain" the round's median), in each round of a time cell that has both."""

    def seconds(one: Mapping[str, Any], name: str) -> float:
        return float(statistics.median(one[name]) if name == "plain" else one[name])

    return [seconds(one, name) / seconds(one, over) for one in cell.get("rounds", []) if name in one and over in one]


def per_step(content: Content, case: str, steps: int, name: str) -> float | None:
    """Time of a method, per inner step, over a plain step: the median over the rounds."""
    found = ratios(find(content, kind="time", case=case, steps=steps), name)
    return statistics.median(found) / steps if found else None


def per_iteration(content: Content, case: str, name: str, *, teacher: bool = False, over: str = "plain") -> list[float]:
    """Time of a loop's iteration over another's, in each round."""
    cell = find(content, kind="time", case=case, teacher=teacher)
    return [ratio / (cell["steps"] if name in WINDOWS else 1) for ratio in ratios(cell, name, over)]


def memory(content: Content, case: str, steps: int, name: str, *, whole: bool = False) -> float | None:
    """Memory of a method's call in MB: its peak less what was there before it, or the whole peak."""
    cell = find(content, kind="memory", case=case, steps=steps, method=name)
    return cell["peak"] - (0 if whole else cell["before"]) if "peak" in cell else None


def failures(content: Content) -> list[tuple[dict[str, Any], str, str]]:
    """What could not be measured: the cell, the method and the reason."""
    found = []
    for cell in content["cells"]:
        reasons = {cell.get("method", "all methods"): cell["died"]} if "died" in cell else cell.get("failed", {})
        found += [(cell, name, why) for name, why in reasons.items()]
    return found
