"""Which rate do tables of weights need, and do the meta images belong into training? Small tasks on the digits.

    python benchmarks/table_rates.py --threads 1         # all tasks, fifteen minutes of one core
    python benchmarks/table_rates.py --preset smoke      # seconds: does it run?

Writes results.json and README.md to --output, each cell as soon as it is there; the same command after an interruption
goes on where it stopped. What `notes.md` there says is put at the end of README.md. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import rates
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.markdown import provenance, spread, table, what_failed, write_readme
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content
from benchmarks.common.small_tasks import BATCH, HELD, TASKS
from benchmarks.common.with_meta import METHODS_WITH_META

PRESETS = {
    "full": {
        "tasks": list(TASKS), "seeds": [0, 1, 2], "epochs": 15, "long": 60,
        "output": ROOT / "benchmarks" / "results" / "table_rates",
    },
    "smoke": {"tasks": ["sources"], "seeds": [0], "epochs": 1, "long": 2, "output": Path("runs") / "table-rates-smoke"},
}  # fmt: skip

TEXT = """\
# The learning rate of tables

{provenance}

Scikit-learn's digits, a network of one hidden layer of 64, SGD with momentum, {epochs} epochs of batches of {batch},
cosine decay. {held} images a class are the meta set, {held} others the validation set by which the rate was chosen. The
weight model's optimizer is Adam without decay, at the rate in the name; one row has BiKD's weight decay. `bounded`
weights are in (0, 2), `softplus` weights have no upper end; all start at 1. Equal weights are the same loss without
learning; right labels alone are the oracle.

{tasks}

## Validation accuracy

In percent after the last epoch, mean ± standard deviation over the seeds {seeds}. The last column is the mean over the
tasks.

{validation}

## Test accuracy

{test}

## Lowest and highest weight at the end

Over all training images and seeds.

{weights}

## {long} epochs

Without an upper end weights go on growing. Test accuracy, and the highest weight at the end:

{longer}

## Meta images among the training images

A table, `bounded`, rate 0.1, {epochs} epochs. Each training batch has {batch} meta images beside its {batch} training
images, at the weight in the name; another meta batch judges the step. *Two parts*: the meta set is split in two; one
part is trained on, the other judges; they take turns from step to step, or not. Test accuracy, the mean validation
accuracy over the tasks, and the meta loss in the last epoch:

{with_meta}
"""

LONG = ("bounded, 0.1", "softplus, 0.1", "softplus, 0.3")
"""Methods that are also trained longer."""


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    of_rates, of_meta = ([c for c in content["cells"] if c["kind"] == kind] for kind in ("rates", "meta"))
    lengths = sorted({cell["epochs"] for cell in of_rates})
    cells, long = ([cell for cell in of_rates if cell["epochs"] == n] for n in (lengths[0], lengths[-1]))
    tasks = [task for task in TASKS if any(cell["task"] == task for cell in cells)]
    names = [name for name in rates.NAMES if any(name in cell.get("found", {}) for cell in cells)]

    def values(task: str, name: str, key: str, cells: Sequence[Mapping[str, Any]] = cells) -> list[float]:
        found = [cell["found"].get(name, {}) for cell in cells if cell["task"] == task and "found" in cell]
        return [one[key] for one in found if key in one]

    def at_last(task: str, name: str) -> str:
        test, high = values(task, name, "test", long), values(task, name, "high", long)
        return f"{spread(test)}; {max(high):.1f}" if test else ""

    def accuracies(key: str) -> str:
        rows = []
        for name in names:
            known = [values(task, name, key) for task in tasks]
            over_all = f"{mean(map(mean, known)):.1f}" if all(known) else ""
            rows.append([name, *(spread(found) if found else "" for found in known), over_all])
        return table(["weights, rate", *tasks, "mean"], rows)

    def ends(task: str, name: str) -> str:
        low, high = values(task, name, "low"), values(task, name, "high")
        return f"{min(low):.2f} to {max(high):.2f}" if low else ""

    def mixed(task: str, name: str) -> str:
        found = [c["found"][name] for c in of_meta if c["task"] == task and name in c.get("found", {})]
        loss = [one["meta loss"] for one in found if "meta loss" in one]
        return spread([one["test"] for one in found]) + (f"; {mean(loss):.3f}" if loss else "") if found else ""

    def chosen_by(name: str) -> str:
        found = [c["found"][name]["validation"] for c in of_meta if name in c.get("found", {})]
        return f"{mean(found):.1f}" if found else ""

    joinable = [task for task in tasks if any(cell["task"] == task for cell in of_meta)]
    text = TEXT.format(
        provenance=provenance(content),
        epochs=lengths[0],
        long=lengths[-1],
        with_meta=table(
            ["", *joinable, "validation"],
            [[name, *(mixed(task, name) for task in joinable), chosen_by(name)] for name in METHODS_WITH_META],
        ),
        longer=table(["weights, rate", *tasks], [[name, *(at_last(task, name) for task in tasks)] for name in LONG]),
        batch=BATCH,
        held=HELD,
        tasks="\n".join(f"- **{task}**: {_said(TASKS[task])}" for task in tasks),
        seeds=", ".join(map(str, sorted({cell["seed"] for cell in cells}))),
        validation=accuracies("validation"),
        test=accuracies("test"),
        weights=table(
            ["weights, rate", *tasks],
            [[name, *(ends(task, name) for task in tasks)] for name in names if name in rates.LEARNED],
        ),
    )
    return [write_readme(folder, text + what_failed(content, lambda cell: f"{cell['task']}, seed {cell['seed']}"))]


def _said(function: Any) -> str:
    return str(function.__doc__).splitlines()[0]


def main() -> None:
    """Measure the cells that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, rates.NAMES)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="of the student")
    parser.add_argument("--long", type=int, help="epochs of the few methods that are also trained longer")
    args = parse(parser, PRESETS)
    keys = [{"task": task, "seed": seed, "epochs": args.epochs} for task in args.tasks for seed in args.seeds]
    jobs = [Job({"kind": "rates", **key}, args.methods) for key in keys]
    longer = [name for name in LONG if name in args.methods]
    jobs += [Job({"kind": "rates", **key, "epochs": args.long}, longer) for key in keys if longer]
    if args.methods == parser.get_default("methods"):
        one_term = [key for key in keys if key["task"] != "annotators"]
        jobs += [Job({"kind": "meta", **key}, list(METHODS_WITH_META)) for key in one_term]
    for path in write(measure(args, rates, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
