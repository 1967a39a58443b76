"""README.md of `quick_ways.py`: one table a case, one of accuracies, the figure."""

import statistics
from pathlib import Path

from benchmarks.common.cases import CASES
from benchmarks.common.digits import DIGITS
from benchmarks.common.markdown import plain_milliseconds, provenance, spread, table, what_failed, write_readme
from benchmarks.common.numbers import Content, entries, find, per_iteration
from benchmarks.common.quick import COMPARED, DRAWS, WAYS
from benchmarks.quick_ways_figure import draw

TEXT = """\
# Quick ways to a hypergradient

{provenance}

The exact way is `OneStep()` on a meta batch as large as the training batch. The others ask for less:

| way | what it is |
|---|---|
| last stage and classifier | `OneStep(parameters=...)`: the step ahead moves these alone; the stage is {patterns} |
| classifier | `OneStep(parameters=...)`: it moves the classifier alone |
| half, a quarter of the meta batch | `OneStep()` on so many of the meta batch's samples |
| one-sided difference | `FiniteDifference(sides=1)`: one forward pass in place of the forward-mode pass |

- **Time**: a whole training iteration, the student's own step included, over a plain distillation iteration; the
  teacher's outputs are given. The ways take turns: each round times every way once, with a plain iteration before each.
  A number is the median over the rounds, with the smallest and the largest behind it. First calls, which hold the proof
  of virtual passes, are not timed.
- **Error**: |g - exact| / |exact| of the hypergradient in the parameters of `LossMLP`, and its **cosine** with the
  exact one on the full meta batch. Means over {compared} training batches, and over {draws} draws of a smaller meta
  batch. "At the start" is a freshly drawn student, "later" the same after the given number of plain iterations.

{cases}

{ways}

## What a student makes of it

Test accuracy in percent of BiKD on the digits of `examples/cifar_lt_bikd.py --sources 0` ({student}, {epochs} epochs):
mean and standard deviation over the seeds {seeds}, and the mean of each seed's difference to the exact way. The student
has two layers, so that its last stage and classifier are all there is. Meta batches have {batch}, {half} and {quarter}
images.

{accuracy}

![Time and error of the quick ways](quick_ways.png)
"""


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md and quick_ways.png."""
    seeds = sorted(entries(content, "seed"))
    text = TEXT.format(
        provenance=provenance(content),
        patterns=", ".join(f"`{CASES[case].stage}` in {case}" for case in entries(content, "case")),
        compared=COMPARED,
        draws=DRAWS,
        cases=_cases(content),
        ways=_ways(content),
        student=DIGITS.student,
        epochs=", ".join(map(str, entries(content, "epochs"))),
        seeds=", ".join(map(str, seeds)),
        batch=DIGITS.batch_size,
        half=DIGITS.batch_size // 2,
        quarter=DIGITS.batch_size // 4,
        accuracy=_accuracy(content),
    )
    figure = folder / "quick_ways.png"
    draw(content, figure)
    return [write_readme(folder, text), figure]


def later(content: Content) -> int:
    """Plain iterations before the second look at the errors."""
    return max(entries(content, "after"), default=0)


def accuracies(content: Content) -> dict[str, list[float]]:
    """Each way's accuracies, in the order of the seeds."""
    cells = sorted((cell for cell in content["cells"] if "accuracy" in cell), key=lambda cell: int(cell["seed"]))
    return {name: found for name in WAYS if (found := [c["accuracy"][name] for c in cells if name in c["accuracy"]])}


def _cases(content: Content) -> str:
    rows = []
    for case in entries(content, "case"):
        time = find(content, kind="time", case=case)
        inputs = find(content, kind="errors", case=case).get("inputs", "")
        size = str(content["settings"]["batch_size"] or CASES[case].batch_size)
        rows.append([case, size, plain_milliseconds([time]), str(len(time.get("rounds", []))), inputs])
    plain = "plain iteration, ms: median (10 to 90 % of them)"
    return table(["case", "batch size", plain, "rounds", "inputs of the errors"], rows)


def _ways(content: Content) -> str:
    rows = []
    for case in entries(content, "case"):
        for name in WAYS:
            times = per_iteration(content, case, name)
            shown = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if times else ""
            rows.append([case, name, shown, *(_error(content, case, name, at) for at in (0, later(content)))])
    head = ["case", "way", "time", "error (cosine), at the start", f"later, after {later(content)}"]
    return table(head, rows, left=2) + what_failed(content, lambda cell: cell.get("case", "digits"))


def _error(content: Content, case: str, name: str, after: int) -> str:
    if name == "exact":
        return "0 (1)"
    cell = find(content, kind="errors", case=case, after=after)
    errors, cosines = (cell.get(key, {}).get(name) for key in ("errors", "cosines"))
    return f"{statistics.mean(errors):.2g} ({statistics.mean(cosines):.3f})" if errors and cosines else ""


def _accuracy(content: Content) -> str:
    found, rows = accuracies(content), []
    for name, own in found.items():
        over = [a - b for a, b in zip(own, found["exact"], strict=True)]
        rows.append([name, spread(own), f"{statistics.mean(over):+.2f}" if any(over) else "0"])
    return table(["way", "accuracy", "over exact"], rows)
