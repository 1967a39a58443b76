"""README.md of `iteration.py`: one table, the goals with their verdicts, the figure."""

import statistics
from pathlib import Path

from benchmarks.common.cases import CASES
from benchmarks.common.loops import METHODS, PERIOD
from benchmarks.common.markdown import (
    memory_is,
    number,
    plain_milliseconds,
    provenance,
    table,
    verdict,
    what_failed,
    write_readme,
)
from benchmarks.common.numbers import Content, entries, failures, find, memory, per_iteration
from benchmarks.iteration_figure import draw

TEXT = """\
# What a training iteration with learned weights costs

{provenance}

An iteration is all that a training loop does for one batch: forward pass, loss, `zero_grad`, `backward` and the step of
`SGD(momentum=0.9, weight_decay=5e-4)`. "plain" is that with fixed weights on cross-entropy and soft targets. The others
learn the weights: an exact hypergradient through one step of plain SGD and a meta batch of the same size, a step of
Adam on `LossMLP`, and the student's step under the new weights. They all make the same student. All data are random.

- **Time**: over plain iterations. The methods take turns: each round times every method once, with a plain iteration
  before each. A number is the median over the rounds of (method / the round's median plain iteration), with the
  smallest and the largest behind it.
- **With a teacher**: the same where all methods, plain as well, also run a teacher on the training batch. Elsewhere
  its outputs are given.
- **Memory**: what one call takes beyond what was there before it, in MB: {memory}
- `accumulate={period}` and `every={period}` are settings of metakd; their numbers are means over {period} iterations.
  "4 terms" and "8 terms" are `accumulate=1` with more than the two terms, on the same logits.
- "published way": the student is copied, `meta_loss.backward()` runs through the copy, and a second forward pass of the
  student takes the new weights. "by hand" is the same with less work than the published codes do:
  `torch.func.functional_call` in place of the copy, and gradients in the weight model's parameters alone. MetaSGD and
  higher take gradients in these alone too, and the second forward pass.
- Fused attention and the fused LSTM cannot be differentiated twice. metakd switches them off where it must, for the
  peers the benchmark does; "plain" and the student's own passes keep them.

{cases}

{methods}

## Goals

Teacher's outputs given.

{goals}

![Time and memory of an iteration](cost.png)
"""
GOALS = [
    ("`accumulate=1`, at most 3.6", "accumulate=1", "plain", 3.6),
    (f"`accumulate={PERIOD}`, at most 3.2", f"accumulate={PERIOD}", "plain", 3.2),
    (f"`every={PERIOD}`, at most 1.45", f"every={PERIOD}", "plain", 1.45),
    ("8 terms over 2 terms, at most 1.1", "8 terms", "accumulate=1", 1.1),
]


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md and cost.png."""
    text = TEXT.format(
        provenance=provenance(content),
        memory=memory_is(content),
        period=PERIOD,
        cases=_cases(content),
        methods=_methods(content),
        goals=_goals(content),
    )
    figure = folder / "cost.png"
    draw(content, figure)
    return [write_readme(folder, text), figure]


def _cases(content: Content) -> str:
    rows = []
    for case in entries(content, "case"):
        cells = [find(content, kind="time", case=case, teacher=teacher) for teacher in (False, True)]
        rows.append(
            [
                case,
                str(content["settings"]["batch_size"] or CASES[case].batch_size),
                *(plain_milliseconds([cell]) for cell in cells),
                ", ".join(str(len(cell["rounds"])) for cell in cells if "rounds" in cell),
            ]
        )
    plain = "plain iteration, ms: median (10 to 90 % of them)"
    return table(["case", "batch size", plain, "with a teacher", "rounds"], rows)


def _methods(content: Content) -> str:
    failed = {(cell["kind"], cell["case"], cell["teacher"], name) for cell, name, _ in failures(content)}
    rows = []
    for case in entries(content, "case"):
        for name in METHODS:
            times = [
                "fails" if ("time", case, teacher, name) in failed else _spread(content, case, name, teacher)
                for teacher in (False, True)
            ]
            mb = memory(content, case, PERIOD, name)
            megabytes = "fails" if ("memory", case, False, name) in failed else number(mb, ",.0f")
            if any([*times, megabytes]):
                rows.append([case, name, times[0], _in_its_mode(content, case, name), times[1], megabytes])
    head = ["case", "method", "time", "over plain in the same mode", "time, with a teacher", "MB"]
    if not any(row[3] for row in rows):
        head, rows = [*head[:3], *head[4:]], [[*row[:3], *row[4:]] for row in rows]
    table_of_all = table(head, rows, left=2)
    return table_of_all + what_failed(content, lambda cell: cell["case"] + ", with a teacher" * cell["teacher"])


def _in_its_mode(content: Content, case: str, name: str) -> str:
    """The time over a plain iteration that is captured or compiled as well."""
    plain = f"plain, {name.partition(', ')[2]}"
    return "" if plain not in METHODS or name == plain else _spread(content, case, name, over=plain)


def _spread(content: Content, case: str, name: str, teacher: bool = False, over: str = "plain") -> str:
    if name == "plain":
        return "1"
    found = per_iteration(content, case, name, teacher=teacher, over=over)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""


def _goals(content: Content) -> str:
    cases, rows = entries(content, "case"), []
    for goal, name, over, limit in GOALS:
        found = [per_iteration(content, case, name, over=over) for case in cases]
        rows.append([goal, *(verdict({"": statistics.median(ratios) if ratios else None}, limit) for ratios in found)])
    return table(["goal", *cases], rows)
