"""The page on choosing runs as it stands, and its numbers are those of the committed records."""

import json
import statistics

import pytest

import metakd
from tests.docs.pages import ROOT, run_page, text_of

PAGE = text_of("docs/choose.md")
CASES = ("resnet8x4", "resnet20", "transformer")

COSTS = {  # what to set -> record, method; windows: the hypergradient's time and one plain iteration
    "the defaults, `accumulate=1`": ("iteration", "accumulate=1"),
    "`accumulate=5`": ("iteration", "accumulate=5"),
    "`every=5`": ("iteration", "every=5"),
    "8 terms in place of 2": ("iteration", "8 terms"),
    "`OneStep(parameters=...)`: last stage and classifier": ("quick_ways", "last stage and classifier"),
    "`OneStep(parameters=...)`: classifier": ("quick_ways", "classifier"),
    "`FiniteDifference(sides=1)`": ("quick_ways", "one-sided difference"),
    "`Adjoint()`, windows of 5": ("hypergradient", "Adjoint"),
    "`IdentityJacobian()`, windows of 5": ("hypergradient", "IdentityJacobian"),
    "`Unroll()`, windows of 5": ("hypergradient", "Unroll"),
}


def record(name):
    return json.loads((ROOT / "benchmarks/results" / name / "results.json").read_text())


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_code_runs_on_top_of_the_readmes(capsys):
    losses = []
    scope = run_page("docs/choose.md", lambda scope: losses.append(scope.pop("loss", None)), metakd=metakd, loss=None)
    computed = [loss for loss in losses if loss is not None]
    assert computed and all(loss.requires_grad for loss in computed)
    assert scope["fixed"].report.weights.unique().tolist() == [pytest.approx(0.5)]
    assert scope["balancer"].report.influence.abs().sum() > 0


def test_the_costs_are_the_measured_ones():
    pytest.importorskip("higher")  # of the extra "benchmarks"
    from benchmarks.common.numbers import per_iteration, per_step

    table = PAGE.split("| your situation")[1].split("\n\n")[0].splitlines()[2:]
    rows = {setting: costs for _, setting, *costs in map(cells_of, table)}
    assert len(rows) == len(table) == len(COSTS) + 2
    for setting, (name, method) in COSTS.items():
        content = record(name)
        for case, shown in zip(CASES, rows[setting], strict=True):
            if name == "hypergradient":
                measured = per_step(content, case, 5, method) + 1
            else:
                measured = statistics.median(per_iteration(content, case, method))
            assert abs(measured - float(shown)) <= 0.0501, (setting, case, measured)


def test_the_meta_sets_numbers_are_the_measured_ones():
    pytest.importorskip("higher")  # of the extra "benchmarks"
    from benchmarks import meta_set_report as report

    content = record("meta_set")
    head, _, *lines = PAGE.split("## Meta set\n")[1].split("\n\n")[1].splitlines()
    assert cells_of(head)[2:] == [str(size) for size in report.sizes_of(content)]
    rows = {name: numbers for name, *numbers in map(cells_of, lines)}
    for name in report.names(content):
        columns = report.accuracies(content, name)
        assert rows.pop(report.title(name)) == [
            f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns
        ]
    for epochs, when in (("0", "before training"), ("10", "after 10 epochs"), ("100", "after 100 epochs")):
        columns = report.columns(content, epochs, "other set")
        assert rows.pop(f"cosine, {when}") == ["", *(f"{statistics.mean(c):.2f}" for c in columns)]
    assert not rows
