"""The record as README.md: what wins where, each setting's rows, the controls and what the weights know."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import provenance, spread, table, write_readme
from benchmarks.trust import figure
from benchmarks.trust.chosen import ORACLE, RECOMMENDED, Row, best, gains, is_ours, ours, rivals, rows
from benchmarks.trust.presets import Preset
from benchmarks.trust.recipes import Recipe
from benchmarks.trust.settings import SETTINGS

HEAD = """\
# Unreliable sources, annotators, labels and teachers

{provenance}

{data} {steps} steps of SGD {lr:g} (momentum 0.9, weight decay 5e-4, cosine), batches of {batch_size}; meta batches and
the meta samples among the training samples likewise. {validation} clean samples of each class, neither meta nor test,
choose the variant of each row, by the mean over the seeds; test samples choose nothing. Accuracy in percent after the
last step, mean ± standard deviation over the seeds {seeds}. Every seed has a split, a start and unreliable labels of
its own, the same for all rows. "+ meta" rows have the meta samples among their training samples; "oracle" has the right
labels alone (the right teachers alone). The seconds are CPU time of all variants of a row.

{settings}"""

WINS = """\
## What wins

Test accuracy. The best rival is the row without an oracle that has the highest *test* accuracy, which favours the
rivals. *As recommended* is a table at Adam 0.1 with the meta samples among the training samples at 0.3, which was fixed
before these runs; *chosen* is the learned row with the highest validation accuracy. The gains over the best rival are
seed by seed.

{table}"""

CONTROLS = """\
## Controls

Students that were trained anew with the final weights, with these permuted (each source with another one's, each sample
with another one's), and with their mean; meta samples among the training samples at the same weight. Test accuracy:

{table}"""

INFLUENCES = """\
## What the influences say

How often the influence (of the second half of training) and the final weight rank a right label before a wrong one: the
area under the curve, in percent; 50 means that they know nothing.

{table}"""


def write(content: Mapping[str, Any], folder: Path, preset: Preset) -> list[Path]:
    """Write README.md and the figure; the files written."""
    cells = [cell for cell in content["cells"] if cell["protocol"] == preset.protocol()]
    if not cells:
        return []
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for meta in sorted({cell["meta"] for cell in cells}, key=lambda m: (m != preset.metas[0], m)):
        for setting in SETTINGS:
            if of := rows(cells, setting, meta, few=preset.few):
                found[meta, setting] = of
    main = {setting: of for (meta, setting), of in found.items() if meta == preset.metas[0]}
    drawn = figure.draw({s: of[RECOMMENDED] for s, of in main.items() if RECOMMENDED in of},
                        folder / "weights-by-group.png")  # fmt: skip
    head = HEAD.format(
        provenance=provenance(content),
        data=_data(preset),
        **{key: getattr(preset, key) for key in ("steps", "lr", "batch_size", "validation")},
        seeds=", ".join(map(str, sorted({cell["seed"] for cell in cells}))),
        settings="\n".join(f"- **{s}**: {_said(s)}" for s in SETTINGS if any(s == setting for _, setting in found)),
    )
    parts = [
        head,
        (wins := summary(found)) and WINS.format(table=wins),
        f"![The learned weight of each source and annotator]({drawn.name})" if drawn else "",
        *(_section(meta, setting, of) for (meta, setting), of in found.items()),
        (again := controls(found)) and CONTROLS.format(table=again),
        (known := influences(found)) and INFLUENCES.format(table=known),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return [write_readme(folder, text), *([drawn] if drawn else [])]


def _data(preset: Preset) -> str:
    if preset.student == "cnn":
        return (
            f"Real CIFAR-10 images, {preset.per_class} training images of each class, each channel standardised, not "
            f"augmented; the student has three 3 x 3 convolutions of stride 2 ({preset.hidden // 2}, {preset.hidden} "
            f"and {preset.hidden} channels, batch normalisation, ReLU), the mean over the image and a linear layer. "
            "The main rows, with fewer variants than in the [table on features](../unreliable/README.md)."
        )
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
        line = [setting, str(meta), f"{spread(rival.of('test'))} ({rival.name})"]
        for row in (of.get(RECOMMENDED), own):
            over = [] if row is None else gains(row, rival)
            won = f", {sum(gain > 0 for gain in over)} of {len(over)} seeds"
            name = f" ({own.name})" if row is own else ""
            line += [spread(row.of("test")) + name, spread(over) + won] if row is not None and over else ["", ""]
        lines.append([*line, spread(oracle.of("test"))])
    head = ["setting", "meta images a class", "best rival", "as recommended", "gain", "chosen", "gain", "oracle"]
    return table(head, lines, left=3) if lines else ""


def _section(meta: int, setting: str, of: Mapping[str, Row]) -> str:
    order = sorted(of.values(), key=lambda row: (row.name == ORACLE, is_ours(row.name)))
    lines = [
        [row.name, str(row.tried), told(row.recipe), spread(row.of("validation")), spread(row.of("test")),
         str(len(row.cells)), f"{row.seconds:.1f}"]
        for row in order
    ]  # fmt: skip
    head = ["", "variants", "chosen", "validation", "test", "seeds", "seconds"]
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
    if not lines:
        return ""
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
    head = ["setting", "meta images a class", "", "influences", "weights"]
    return table(head, lines, left=3) if lines else ""
