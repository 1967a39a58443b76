"""README.md of `hypergradient.py`: one table, the goals with their verdicts, the figure."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common.cases import CASES
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
from benchmarks.common.methods import METHODS
from benchmarks.common.numbers import Content, entries, failures, find, memory, per_step, ratios
from benchmarks.hypergradient_figure import draw

TEXT = """\
# What a hypergradient costs

{provenance}

One problem for all: a student in train mode takes K steps of plain SGD on the weighted sum of cross-entropy and soft
targets. The weights come from `LossMLP`. The cross-entropy of a meta batch of the same size after the K steps is
differentiated in the weight model's parameters. All data are random. "plain" is a step of knowledge distillation with
fixed weights, forward and backward.

- **Time per inner step**: a whole call (K steps, the meta batch, and the way back through both) over K times a plain
  step. The methods take turns: each round times every method once, with plain steps between them. A number is the
  median over the rounds of (method / the round's median plain step) / K.
- **Memory**: what one call takes beyond what was there before it, in MB: {memory}
- **Error**: of the hypergradient, relative to the one by hand (Euclidean norms), the largest over K.
  `IdentityJacobian` and `FiniteDifference` are approximations by design.
- metakd runs by `BilevelLossBalancer.meta_step`. "by hand" is `torch.func.functional_call` with `create_graph=True`.
- Fused attention and the fused LSTM cannot be differentiated twice. metakd switches them off by itself, for by hand,
  MetaSGD and higher the benchmark does. "plain" keeps them, "plain, unfused" does not.
- `nn.LSTM` does not see MetaSGD's new parameters by itself: the benchmark hands them over.

{cases}

{methods}

## Goals

The worst K counts. The whole process is the libraries, the data and the call.

{goals}

![Time per inner step and memory against K](cost.png)
"""


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md and cost.png."""
    text = TEXT.format(
        provenance=provenance(content),
        memory=memory_is(content),
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
        cells = [find(content, kind="time", case=case, steps=steps) for steps in sorted(entries(content, "steps"))]
        if not (plain := plain_milliseconds(cells)):
            continue
        rows.append(
            [
                case,
                str(content["settings"]["batch_size"] or CASES[case].batch_size),
                f"{CASES[case].lr:g}",
                plain,
                ", ".join(str(len(cell.get("rounds", []))) for cell in cells),
            ]
        )
    steps = ", ".join(map(str, sorted(entries(content, "steps"))))
    plain_head = "plain step, ms: median (10 to 90 % of them)"
    return table(["case", "batch size", "inner lr", plain_head, f"rounds at K = {steps}"], rows)


def _methods(content: Content) -> str:
    steps = sorted(entries(content, "steps"))
    head = ["case", "method", *(f"time, K={k}" for k in steps), *(f"MB, K={k}" for k in steps), "error"]
    failed = {(cell["kind"], cell["case"], name, cell["steps"]) for cell, name, _ in failures(content)}
    rows = []
    for case in entries(content, "case"):
        for name in METHODS:
            times, megabytes = (
                [
                    "fails" if (kind, case, name, k) in failed else number(value(content, case, k, name), form)
                    for k in steps
                ]
                for kind, value, form in (("time", per_step, ".2f"), ("memory", memory, ",.0f"))
            )
            cells = [find(content, kind="time", case=case, steps=k) for k in steps]
            errors = [cell["errors"][name] for cell in cells if name in cell.get("errors", {})]
            if name == "plain":
                times = ["1", *[""] * (len(steps) - 1)]
            if any([*times, *megabytes]):
                rows.append([case, name, *times, *megabytes, number(max(errors, default=None), ".0e")])
    return table(head, rows, left=2) + what_failed(content, lambda cell: f"{cell['case']}, K = {cell['steps']}")


def _goals(content: Content) -> str:
    cases = entries(content, "case")
    rows = [[goal, *(verdict(values[case], limit) for case in cases)] for goal, limit, values in goals(content)]
    return table(["goal", *cases], rows)


Values = dict[str, dict[str, float | None]]


def goals(content: Content) -> list[tuple[str, float, Values]]:
    """Each goal with its limit, and what was measured: case -> where -> value."""
    steps = sorted(entries(content, "steps"))

    def measured(value: Callable[[str, int], float | None], at: Iterable[int] = steps) -> Values:
        return {case: {f"at K = {k}": value(case, k) for k in at} for case in entries(content, "case")}

    def against_torchopt(case: str, k: int) -> float | None:
        found = ratios(find(content, kind="time", case=case, steps=k), "Adjoint", over="TorchOpt MetaSGD")
        return statistics.median(found) if found else None

    def growth(whole: bool) -> Values:
        return measured(lambda case, k: _over(mb(case, 20, "Adjoint", whole), mb(case, 2, "Adjoint", whole)), [20])

    def share(whole: bool) -> Values:
        return measured(lambda case, k: _over(mb(case, 20, "Adjoint", whole), mb(case, 20, "Unroll", whole)), [20])

    def mb(case: str, k: int, name: str, whole: bool) -> float | None:
        return memory(content, case, k, name, whole=whole)

    limit = 1.5 if content["settings"]["device"] == "cpu" else 1.1
    return [
        ("`Adjoint`, time per inner step, at most 4.3", 4.3, measured(lambda c, k: per_step(content, c, k, "Adjoint"))),
        ("`Adjoint`, time over TorchOpt MetaSGD, at most 1", 1.0, measured(against_torchopt)),
        (f"`Adjoint`, memory of a call over that at K = 2, at most {limit}", limit, growth(False)),
        (f"the same of the whole process, at most {limit}", limit, growth(True)),
        ("`Adjoint`, memory of a call over `Unroll`, at most 0.25", 0.25, share(False)),
        ("the same of the whole process, at most 0.25", 0.25, share(True)),
    ]


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
