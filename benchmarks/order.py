"""Does the order of the two steps matter? BiKD on the long-tailed digits, weight model first or both at once.

    python benchmarks/order.py --threads 1             # five seeds
    python benchmarks/order.py --preset smoke          # seconds: does it run?

Writes results.json and README.md to --output. The same command after an interruption goes on where it stopped. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

import statistics
from pathlib import Path

from benchmarks.common import orders
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.digits import DIGITS
from benchmarks.common.markdown import provenance, spread, table, what_failed, write_readme
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content

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
    parser = parser_of(__doc__, PRESETS, list(orders.METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int)
    args = parse(parser, PRESETS)
    jobs = [Job({"kind": "accuracy", "seed": seed, "epochs": args.epochs}, list(orders.METHODS)) for seed in args.seeds]
    for path in write(measure(args, orders, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
