"""The table of all cells that are there, as Markdown, with its figures."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import spread, table, write_readme
from benchmarks.longtail import figures, methods
from benchmarks.longtail.presets import Preset

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""method -> its cells, in the order of their seeds."""

CHOICE = re.compile(r" --(?:datasets|imbalances|seeds|methods|until)(?: (?!--)\S+)+")
"""The part of a command that says which cells."""

HURRIED = " With `--fast` the teachers' passes are in bfloat16 and their weights in eight bits, all else in TF32."

CHOSEN = (
    " This is a choice among methods: what is called test images here are {} training images a class that were set "
    "aside, neither meta nor training images, and no test image was looked at."
)

SCORES = {"overall": "accuracy", "many": "many", "medium": "medium", "few": "few", "ece": "ECE", "loss": "loss"}


def read(folder: Path) -> dict[tuple[str, float], dict[str, list[dict[str, Any]]]]:
    """The cells by data set and imbalance, then by method in the order of the table."""
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("cells/*/*.json")):
        cell = json.loads(path.read_text())
        about = cell["settings"]
        found[about["dataset"], about["imbalance"]][about["method"]].append(cell)
    return {
        key: {name: sorted(by[name], key=seed_of) for name in sorted(by, key=methods.position)}
        for key, by in sorted(found.items())
    }


def seed_of(cell: Mapping[str, Any]) -> int:
    """The seed of a cell."""
    return int(cell["settings"]["seed"])


def write(folder: Path, preset: Preset) -> list[Path]:
    """Write README.md and the figures; the files written."""
    sections, written = [], []
    found = read(folder)
    for (dataset, imbalance), cells in found.items():
        drawn = figures.draw(folder, f"{dataset}-{imbalance:g}", cells)
        sections.append(section(f"{dataset}-LT, imbalance {imbalance:g}", cells, drawn))
        written += drawn
    if not sections:
        return []
    cost = folder / "cost.json"
    if cost.exists():
        sections.append(cost_table(json.loads(cost.read_text())))
    all_cells = [cell for by in found.values() for cells in by.values() for cell in cells]
    text = "\n\n".join([head(all_cells, preset), *sections]) + "\n"
    return [write_readme(folder, text), *written]


def head(cells: Sequence[Mapping[str, Any]], preset: Preset) -> str:
    """What was run, with what, on what."""
    seeds = sorted({seed_of(cell) for cell in cells})
    versions = sorted({", ".join(f"{name} {v}" for name, v in cell["versions"].items()) for cell in cells})
    hardware = sorted({f"{cell['hardware']['processor']}, {cell['hardware']['cores']} cores, on "
                       f"{cell['hardware']['gpu'] if cell['device'] == 'cuda' else cell['device']}, "
                       f"{cell['threads']} thread(s)" for cell in cells})  # fmt: skip
    return (
        f"# The long-tailed table, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}\n\n"
        f"Teacher {preset.teacher} ({preset.teacher_epochs} epochs, SGD {preset.teacher_lr:g}, batch "
        f"{preset.teacher_batch_size}), trained on the same long-tailed images; student {preset.student}, "
        f"{preset.epochs} epochs of SGD {preset.lr:g} (momentum 0.9, weight decay 5e-4, x0.1 after 2/3 and 5/6), batch "
        f"{preset.batch_size}; weight models by Adam {preset.weighting_lr:g}. Test accuracy in percent after the last "
        "epoch, mean ± standard deviation over the seeds; loss is the cross-entropy on the test images, validation the "
        "accuracy on the validation images, which are the learned methods' meta set; no test image selected anything. "
        "Every seed has a split, a teacher and a start of its own, the same for all methods."
        f"{CHOSEN.format(preset.choice_per_class) * bool(preset.choice_per_class)}"
        f"{HURRIED * any(cell.get('fast') for cell in cells)}\n\n"
        "```bash\n" + "\n".join(commands(cells)) + "\n```\n\n" + "; ".join([*hardware, *versions]) + "."
    )


def commands(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """One command for the methods with the same seeds; each record has the command that it was made by."""
    seeds: dict[tuple[str, str, float], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        about = cell["settings"]
        call = CHOICE.sub("", cell["command"])
        seeds[call, about["dataset"], about["imbalance"]][about["method"]].append(about["seed"])
    found = []
    for (call, dataset, imbalance), by_method in seeds.items():
        together: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for method, own in by_method.items():
            together[tuple(own)].append(method)
        for own, names in together.items():
            about = f"--datasets {dataset} --imbalances {imbalance:g} --seeds {' '.join(map(str, own))}"
            found.append(f"{call} {about} --methods {' '.join(names)}")
    return found


def section(title: str, cells: Cells, drawn: Iterable[Path]) -> str:
    """One data set and imbalance: the table, the differences, the figures."""
    teachers = [cell["teacher"] for cell in {seed_of(c): c for by in cells.values() for c in by}.values()]
    first = min(cells, key=lambda name: bool({"val", "half"} & {*name.split("+")}))  # these have more training images
    counts = cells[first][0]["counts"]
    rows = [row("teacher", teachers)]
    rows += [row(methods.find(name).title, by, "val" not in name.split("+")) for name, by in cells.items()]
    pictures = "\n".join(f"![{title}: {path.stem.split('-', 2)[2].replace('-', ' ')}]({path.name})" for path in drawn)
    parts = [
        f"## {title}",
        f"{sum(counts):,} training images, {max(counts):,} to {min(counts):,} a class.",
        table(["method", *SCORES.values(), "validation", "seeds"], rows),
        differences(cells),
        pictures,
    ]
    return "\n\n".join(part for part in parts if part)


def row(name: str, found: Sequence[Mapping[str, Any]], unseen: bool = True) -> list[str]:
    """One method's row; no validation accuracy where the student was trained on these images."""
    scores = [spread([of["test"][key] for of in found]) for key in SCORES]
    validation = spread([of["validation"]["overall"] for of in found]) if unseen else ""
    return [name, *scores, validation, str(len(found))]


def differences(cells: Cells) -> str:
    """Each learned method against its controls and rivals, by seed: the split and the start are the same."""
    rows = []
    for name, rivals in methods.QUESTIONS.items():
        for rival in rivals:
            ours, theirs = ({seed_of(cell): cell["test"] for cell in cells.get(n, [])} for n in (name, rival))
            if both := sorted(ours.keys() & theirs.keys()):
                gains = [[ours[seed][key] - theirs[seed][key] for seed in both] for key in ("overall", "few")]
                won = sum(gain > 0 for gain in gains[0])
                rows.append(
                    [methods.find(name).title, methods.find(rival).title, *map(spread, gains), f"{won} of {len(both)}"]
                )
    if not rows:
        return ""
    return "What the learned weights add, seed by seed:\n\n" + table(
        ["method", "against", "accuracy gained", "few gained", "seeds won"], rows, left=2
    )


def cost_table(cost: Mapping[str, Any]) -> str:
    """Seconds and memory relative to KD's."""
    rows = [
        [methods.find(name).title, f"{found['time']:.2f}", f"{found['memory'] / cost['methods']['kd']['memory']:.2f}"]
        for name, found in cost["methods"].items()
    ]
    return (
        "## Cost\n\nOf an iteration, the teacher's pass included, relative to KD's: medians of ratios over "
        f"{cost['rounds']} interleaved rounds, and the process's peak memory.\n\n```bash\n{cost['command']}\n```\n\n"
        + table(["method", "time / KD", "memory / KD"], rows)
    )
