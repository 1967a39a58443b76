"""README.md of `hypergradient.py`: one table, the goals with their verdicts, the figure."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.common.cases import CASES
from benchmarks.common.markdown import provenance, table
from benchmarks.common.methods import METHODS
from benchmarks.common.numbers import Content, entries, find, memory, per_step, ratios
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
- **Memory**: what one call takes beyond what was there before it, in MB: {memory}. Each number comes from a process of
  its own.
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
MEMORY = {
    "cpu": "the peak of the process's resident memory less the resident memory before the call",
    "cuda": "the peak of the GPU allocator less what was allocated before the call",
}


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md and cost.png; what notes.md says comes last."""
    notes = folder / "notes.md"
    text = TEXT.format(
        provenance=provenance(content),
        memory=MEMORY[content["settings"]["device"]],
        cases=_cases(content),
        methods=_methods(content),
        goals=_goals(content),
    )
    readme, figure = folder / "README.md", folder / "cost.png"
    readme.write_text(text + (f"\n{notes.read_text()}" if notes.exists() else ""))
    draw(content, figure)
    return [readme, figure]


def _cases(content: Content) -> str:
    rows = []
    for case in entries(content, "case"):
        cells = [find(content, kind="time", case=case, steps=steps) for steps in sorted(entries(content, "steps"))]
        rounds = [cell.get("rounds", []) for cell in cells]
        plain = sorted(1000 * second for found in rounds for one in found for second in one["plain"])
        if not plain:
            continue
        low, high = plain[len(plain) // 10], plain[-1 - len(plain) // 10]
        rows.append(
            [
                case,
                str(content["settings"]["batch_size"] or CASES[case].batch_size),
                f"{CASES[case].lr:g}",
                f"{statistics.median(plain):.3g} ({low:.3g} to {high:.3g})",
                ", ".join(str(len(found)) for found in rounds),
            ]
        )
    steps = ", ".join(map(str, sorted(entries(content, "steps"))))
    plain_head = "plain step, ms: median (10 to 90 % of them)"
    return table(["case", "batch size", "inner lr", plain_head, f"rounds at K = {steps}"], rows)


def _methods(content: Content) -> str:
    steps = sorted(entries(content, "steps"))
    head = ["case", "method", *(f"time, K={k}" for k in steps), *(f"MB, K={k}" for k in steps), "error"]
    failed = {(kind, case, name, k) for kind, case, name, k, _ in failures(content)}
    rows = []
    for case in entries(content, "case"):
        for name in METHODS:
            times, megabytes = (
                [
                    "fails" if (kind, case, name, k) in failed else _number(value(content, case, k, name), form)
                    for k in steps
                ]
                for kind, value, form in (("time", per_step, ".2f"), ("memory", memory, ",.0f"))
            )
            cells = [find(content, kind="time", case=case, steps=k) for k in steps]
            errors = [cell["errors"][name] for cell in cells if name in cell.get("errors", {})]
            if name == "plain":
                times = ["1", *[""] * (len(steps) - 1)]
            if any([*times, *megabytes]):
                rows.append([case, name, *times, *megabytes, _number(max(errors, default=None), ".0e")])
    why = [f"- {case}, {name}, K = {k}, {kind}: {reason}" for kind, case, name, k, reason in failures(content)]
    return "\n".join([table(head, rows, left=2), *(["\nWhat failed:\n", *why] if why else [])])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form) if value else "0"


def failures(content: Content) -> list[tuple[str, str, str, int, str]]:
    """What could not be measured: kind, case, method, K and the reason."""
    found = []
    for cell in content["cells"]:
        reasons = {cell.get("method", "all methods"): cell["died"]} if "died" in cell else cell.get("failed", {})
        found += [(cell["kind"], cell["case"], name, cell["steps"], why) for name, why in reasons.items()]
    return found


def _goals(content: Content) -> str:
    cases = entries(content, "case")
    rows = [[goal, *(_verdict(values[case], limit) for case in cases)] for goal, limit, values in goals(content)]
    return table(["goal", *cases], rows)


def _verdict(values: Mapping[str, float | None], limit: float) -> str:
    known = {where: value for where, value in values.items() if value is not None}
    if not known:
        return ""
    worst = max(known, key=lambda where: known[where])
    verdict = "met" if known[worst] <= limit else f"missed by {100 * (known[worst] / limit - 1):.1f} %"
    return f"{verdict}: {known[worst]:.2f} at {worst}"


Values = dict[str, dict[str, float | None]]


def goals(content: Content) -> list[tuple[str, float, Values]]:
    """Each goal with its limit, and what was measured: case -> where -> value."""
    steps = sorted(entries(content, "steps"))

    def measured(value: Callable[[str, int], float | None], at: Iterable[int] = steps) -> Values:
        return {case: {f"K = {k}": value(case, k) for k in at} for case in entries(content, "case")}

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
