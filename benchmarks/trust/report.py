"""The record as README.md: what wins where, each setting's rows, the controls and what the weights know."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import provenance, spread, table, write_readme
from benchmarks.trust import figure
from benchmarks.trust.chosen import ORACLE, Row, best, gains, is_ours, ours, rivals, rows
from benchmarks.trust.presets import Preset
from benchmarks.trust.recipes import Recipe
from benchmarks.trust.settings import SETTINGS

TEXT = """\
# Unreliable sources, annotators, labels and teachers

{provenance}

{data} {steps} steps of SGD {lr:g} (momentum 0.9, weight decay 5e-4, cosine), batches of {batch_size}; meta batches and
the meta samples among the training samples likewise. {validation} clean samples of each class, neither meta nor test,
choose the variant of each row, by the mean over the seeds; test samples choose nothing. Accuracy in percent after the
last step, mean ± standard deviation over the seeds {seeds}. Every seed has a split, a start and unreliable labels of
its own, the same for all rows. "+ meta" rows have the meta samples among their training samples; "oracle" has the right
labels alone (the right teachers alone). The seconds are CPU time of all variants of a row.

{settings}

## What wins

Test accuracy. The best rival is the row without an oracle that has the highest *test* accuracy, which favours the
rivals; metakd's is the learned row with the highest *validation* accuracy{choice}. The gains are seed by seed.

{summary}

{drawn}

{sections}

## Controls

Students that were trained anew with the final weights, with these permuted (each source with another one's, each sample
with another one's), and with their mean; meta samples among the training samples at the same weight. Test accuracy:

{controls}

## What the influences say

How often the influence (of the second half of training) and the final weight rank a right label before a wrong one: the
area under the curve, in percent; 50 means that they know nothing.

{influences}
"""


CHOICE = """\
; for sources and annotators that of other splits with four times as many validation samples (`--preset choice`, in
[{name}](../{name}/README.md)), which choose among its variants, too"""


def write(content: Mapping[str, Any], folder: Path, preset: Preset) -> list[Path]:
    """Write README.md and the figure; the files written."""
    cells = [cell for cell in content["cells"] if cell["protocol"] == preset.protocol()]
    if not cells:
        return []
    elsewhere = folder.with_name(f"{folder.name}-choice") / "results.json"
    choice = json.loads(elsewhere.read_text())["cells"] if elsewhere.exists() else []
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for meta in sorted({cell["meta"] for cell in cells}, key=lambda m: (m != preset.metas[0], m)):
        for setting in SETTINGS:
            if of := rows(cells, setting, meta, choice):
                found[meta, setting] = of
    main = {setting: of for (meta, setting), of in found.items() if meta == preset.metas[0]}
    drawn = figure.draw({s: of["learned table + meta"] for s, of in main.items() if "learned table + meta" in of},
                        folder / "weights-by-group.png")  # fmt: skip
    text = TEXT.format(
        provenance=provenance(content),
        data=_data(preset),
        **{key: getattr(preset, key) for key in ("steps", "lr", "batch_size", "validation")},
        seeds=", ".join(map(str, sorted({cell["seed"] for cell in cells}))),
        settings="\n".join(f"- **{s}**: {_said(s)}" for s in SETTINGS if any(s == setting for _, setting in found)),
        choice=CHOICE.format(name=elsewhere.parent.name) if choice else "",
        summary=summary(found),
        drawn=f"![The learned weight of each source and annotator]({drawn.name})" if drawn else "",
        sections="\n\n".join(_section(meta, setting, of) for (meta, setting), of in found.items()),
        controls=controls(found),
        influences=influences(found),
    )
    return [write_readme(folder, text), *([drawn] if drawn else [])]


def _data(preset: Preset) -> str:
    student = f"the student is a network of one hidden layer of {preset.hidden}."
    if not preset.filters:
        return f"Pixels of scikit-learn's digits, {preset.per_class} training images of each class; {student}"
    return (
        f"Real CIFAR-10 images, {preset.per_class} training images of each class, as fixed convolutional features that "
        f"no label went into (k-means of whitened patches, Coates et al. 2011: {preset.filters} filters, stride "
        f"{preset.stride}, the four quarters of the image, {preset.components} principal components, fitted to the "
        f"training images); {student} All rows see the same features."
    )


def _said(setting: str) -> str:
    """What a setting is, in a sentence."""
    words = setting.split()
    if words[0] == "symmetric":
        return f"{words[1]} % of the labels are another class, all others alike."
    if words[0] == "pair":
        return (
            f"{words[1]} % of the labels are the class that resembles theirs most (truck for automobile, dog for cat)."
        )
    return str(SETTINGS[setting].__doc__).splitlines()[0]


def summary(found: Mapping[tuple[int, str], dict[str, Row]]) -> str:
    """One line for each setting: the best rival, ours, the oracle."""
    lines = []
    for (meta, setting), of in found.items():
        rival, own, oracle = best(rivals(of), "test"), best(ours(of)), of.get(ORACLE)
        if rival is None or own is None or oracle is None:
            continue
        over = gains(own, rival)
        lines.append(
            [setting, str(meta), f"{spread(rival.of('test'))} ({rival.name})", f"{spread(own.of('test'))} ({own.name})",
             spread(over), f"{sum(gain > 0 for gain in over)} of {len(over)}", spread(oracle.of("test"))]
        )  # fmt: skip
    head = ["setting", "meta images a class", "best rival", "metakd", "gain", "seeds won", "oracle"]
    return table(head, lines, left=4)


def _section(meta: int, setting: str, of: Mapping[str, Row]) -> str:
    order = sorted(of.values(), key=lambda row: (row.name == ORACLE, is_ours(row.name)))
    lines = [
        [row.name, str(row.tried), told(row.recipe), spread(row.of("validation")), spread(row.of("test")),
         f"{row.seconds:.1f}"]
        for row in order
    ]  # fmt: skip
    head = ["", "variants", "chosen", "validation", "test", "seconds"]
    return f"## {setting[0].upper()}{setting[1:]}, {meta} meta images a class\n\n" + table(head, lines, left=3)


def told(recipe: Recipe) -> str:
    """A recipe in a few words: what differs from the default."""
    default, said = Recipe(), []
    names = {"scale": "weights x {}", "meta": "meta at {}", "keep": "keeps {:.0%}", "faster": "learning rate x {}",
             "by": "by {}", "term": "{}", "q": "q = {}", "rate": "rate {}", "folds": "{} folds"}  # fmt: skip
    for key, form in names.items():
        value = getattr(recipe, key)
        if value != getattr(default, key):
            said.append(form.format(value))
    return ", ".join(said).replace("by cell", "by group and label")


def controls(found: Mapping[tuple[int, str], dict[str, Row]]) -> str:
    """The accuracies of students that were trained with weights made from the learned ones."""
    names, lines = ("final, fixed", "permuted", "mean"), []
    for (meta, setting), of in found.items():
        for row in ours(of):
            again = [[cell[name]["test"] for cell in row.cells if name in cell] for name in names]
            if all(again):
                weight = spread(row.of("mean weight"))
                lines.append([setting, str(meta), row.name, spread(row.of("test")), *map(spread, again), weight])
    head = ["setting", "meta images a class", "", "learned", *names, "mean weight"]
    return table(head, lines, left=3)


def influences(found: Mapping[tuple[int, str], dict[str, Row]]) -> str:
    """How well influences and weights tell right labels from wrong ones."""
    lines = []
    for (meta, setting), of in found.items():
        for row in of.values():
            areas = [[100 * value for value in row.of(f"auc of {what}")] for what in ("influences", "weights")]
            if areas[0]:
                lines.append([setting, str(meta), row.name, *(spread(a) if a else "" for a in areas)])
    return table(["setting", "meta images a class", "", "influences", "weights"], lines, left=3)
