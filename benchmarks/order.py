"""Does the order of the two steps matter? BiKD on the long-tailed digits, weight model first or both at once.

    python benchmarks/order.py --threads 1             # five seeds
    python benchmarks/order.py --preset smoke          # seconds: does it run?

Writes results.json and README.md to --output. The same command after an interruption goes on where it stopped. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.markdown import provenance, spread, table, what_failed, write_readme
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content
from benchmarks.common.quick import DIGITS
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.methods import bikd
from benchmarks.longtail.train import Cell, Where, data_of, fit, network, settings_of, teacher_of

METHODS = {f"{order}, k = {k}": (order, k) for k in (1, 5) for order in ("sequential", "simultaneous")}
MILESTONES = (2 / 3, 5 / 6)
PRESETS = {
    "full": {
        "cases": [], "repeats": 1, "seconds": 0.0, "seeds": [0, 1, 2, 3, 4], "epochs": DIGITS.epochs,
        "output": ROOT / "benchmarks" / "results" / "order",
    },
    "smoke": {
        "cases": [], "repeats": 1, "seconds": 0.0, "seeds": [0], "epochs": 2, "output": Path("runs") / "order-smoke",
    },
}  # fmt: skip
TEXT = """\
# The order of the two steps

{provenance}

Test accuracy in percent, last epoch, of BiKD on the digits of `examples/cifar_lt_bikd.py --sources 0` (imbalance 20,
{epochs} epochs), mean and standard deviation over {seeds} seeds. With `order="sequential"` the weight model steps first
and the student takes the new weights, as in the published codes. With `order="simultaneous"` the student takes the
weights that the lookahead has judged, and the weight model's step counts from the next call on. k is `accumulate`.
Orders of one seed share the teacher and the start; the difference is that of simultaneous and sequential, seed by seed.

{results}
"""


def accuracy_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy with each order, all from one teacher and one start.

    Returns:
        accuracy: name -> percent.
    """
    preset = replace(DIGITS, epochs=cell["epochs"], teacher_epochs=min(cell["epochs"], DIGITS.teacher_epochs))
    found = {}
    with tempfile.TemporaryDirectory() as work:
        where = Where(None, False, Path(work), "cpu")
        at = Cell("digits", 20.0, "teacher", cell["seed"])
        data, (teacher, _) = data_of(at, preset, where), teacher_of(at, preset, where, MILESTONES)
        for name in cell["methods"]:
            order, k = METHODS[name]
            one, learned = at._replace(method=name.replace(" ", "")), Learned(name, bikd(accumulate=k, order=order))
            student, settings = network(one, preset, where), settings_of(one, preset, learned)
            result = fit(one.name, settings, preset, where, student, teacher, data, learned, MILESTONES)
            found[name] = result["test"]["overall"]
    return {"accuracy": found}


CELLS = {"accuracy": accuracy_cell}


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    cells = [cell["accuracy"] for cell in content["cells"] if "accuracy" in cell]
    rows = []
    for k in (1, 5):
        pairs = [(cell[f"sequential, k = {k}"], cell[f"simultaneous, k = {k}"]) for cell in cells]
        if pairs:
            rows.append([str(k), *map(spread, zip(*pairs, strict=True)), spread([b - a for a, b in pairs])])
    text = TEXT.format(
        provenance=provenance(content),
        epochs=statistics.mode(cell["epochs"] for cell in content["cells"]) if cells else 0,
        seeds=len(cells),
        results=table(["k", "sequential", "simultaneous", "difference"], rows),
    )
    return [write_readme(folder, text + what_failed(content, lambda cell: f"seed {cell['seed']}"))]


def main() -> None:
    """Train the seeds that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int)
    args = parse(parser, PRESETS)
    jobs = [Job({"kind": "accuracy", "seed": seed, "epochs": args.epochs}, list(METHODS)) for seed in args.seeds]
    import benchmarks.order as module  # as its cells' processes import it

    for path in write(measure(args, module, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
