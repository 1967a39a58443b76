"""All methods of a table's folder in the order of what they gain on one of them, over all its cells.

python -m benchmarks.longtail.ranking benchmarks/results/gpu/choice/table --against mixture+val
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.markdown import spread, table

Accuracies = Mapping[str, Mapping[tuple[str, float, int], float]]
"""method -> (data set, imbalance, seed) -> accuracy."""


def read(folder: Path) -> Accuracies:
    """The accuracies of all cells that are there."""
    found: dict[str, dict[tuple[str, float, int], float]] = defaultdict(dict)
    for path in sorted(folder.glob("cells/*/*.json")):
        cell = json.loads(path.read_text())
        about = cell["settings"]
        found[about["method"]][about["dataset"], about["imbalance"], about["seed"]] = cell["test"]["overall"]
    return found


def ranked(found: Accuracies, against: str) -> list[tuple[str, list[float]]]:
    """Each method with what it gains in the cells that both have, the best mean first; without any it is left out."""
    theirs = found.get(against, {})
    gains = {
        name: [own[key] - theirs[key] for key in sorted(own.keys() & theirs.keys())] for name, own in found.items()
    }
    known = [(name, by) for name, by in gains.items() if by]
    return sorted(known, key=lambda entry: -statistics.mean(entry[1]))


def main() -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", default="mixture+val")
    args = parser.parse_args()
    rows = [
        [name, spread(gains), str(len(gains)), " ".join(f"{gain:+.2f}" for gain in gains)]
        for name, gains in ranked(read(args.folder), args.against)
    ]
    print(table(["method", f"points over {args.against}", "cells", "each"], rows))


if __name__ == "__main__":
    main()
