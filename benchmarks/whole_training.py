"""Weights by the exact hypergradient of the final meta loss through a whole training, beside one step ahead.

    python benchmarks/whole_training.py --threads 1 --clock cpu      # ten minutes of one core
    python benchmarks/whole_training.py --preset smoke               # seconds: does it run?

Writes results.json and README.md to --output, each cell as soon as it is there; the same command after an interruption
goes on where it stopped. What `notes.md` there says is put at the end of README.md. Needs
`pip install -e ".[benchmarks,examples]"`.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.common import whole
from benchmarks.common.cases import CASES
from benchmarks.common.command import Job, measure, parse, parser_of, run
from benchmarks.common.course import ACTIVATIONS, AMONG, GROUPS
from benchmarks.common.markdown import provenance, spread, table, what_failed, write_readme
from benchmarks.common.measure import ROOT
from benchmarks.common.numbers import Content
from benchmarks.common.small_tasks import TASKS

PRESETS = {
    "full": {
        "tasks": list(GROUPS), "students": list(ACTIVATIONS), "seeds": [0, 1, 2], "steps": 300,
        "output": ROOT / "benchmarks" / "results" / "whole_training",
    },
    "smoke": {
        "tasks": ["sources"], "students": ["ReLU"], "seeds": [0], "steps": 6,
        "output": Path("runs") / "whole-training-smoke",
    },
}  # fmt: skip


TEXT = """\
# Weights learned through a whole training

{provenance}

Scikit-learn's digits, a network of one hidden layer of 64 with ReLU or GELU, {steps} steps of SGD with momentum, on 50
training images and 50 meta images at weight {among}; the learning rate falls to a tenth after two thirds of the steps.
10 images a class are the meta set. All methods train on it, from the same start and, but for those that leave images
out, on the same batches.

- **sources**: {sources}
- **long tail**: {tail}

*Whole training*: one weight for each group (source or class) and third of the training. Each of {outer} outer steps
takes the exact derivative of the meta loss after the last step through all steps (`hypergradient`, by `Adjoint`), and
moves every free number by {size:g} against its sign; a weight is twice the sigmoid of its free number. *From the
first decay on*: the same for the last third alone, from a checkpoint. *One step ahead*: the balancer's table of one
weight a group, Adam at 0.1. *Its last weights anew*: that table's end as fixed weights from the start. *Samples by
sign*: the same outer steps in one weight for each image; the student trains on the images whose weight has grown.
*Oracle*: the right labels alone; on the long tail weights by the inverse of the class counts, at most 2.

## Test accuracy

In percent after the last step, mean ± standard deviation over the seeds {seeds}.

{accuracy}

## Outer steps

Meta loss, and test accuracy in brackets, of the whole training after each outer step; means.

{path}

## Is it smooth?

Empirical metasmoothness (Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025): students are
trained with weights phi, phi + h v and phi + 2 h v. The number says how well the two differences of each of the
student's parameters agree in sign, counted by the size of the first: 1 if all do, 0 by chance. v is against the
hypergradient's sign, or a random sign; phi are equal weights. In brackets, the median of the meta loss's change from
phi to phi + h v over the predicted one.

{smooth}

Central finite differences in float64 along the random v, over the exact derivative; 1 is right. The worst seed's.

{differences}

## What was learned

Mean weights in the first, second and last third of the training; means over the seeds.

{weights}

Images kept by sign, in percent, and how many of the kept and of the dropped ones have right labels:

{kept}

## Cost

Of one hypergradient through {steps} steps, and of a training one step ahead, in plain trainings of as many steps. The
memory is the peak of the process's resident memory less that before.

{cost}

`Adjoint` keeps parameters, momentum and gradient of each step, 12 bytes a parameter and step in float32. For other
students that is

{larger}
"""
MEMORY = ("states kept", "memory, plain", "memory, hypergradient")
GROUPED = {
    "sources": {"right": slice(0, 3), "half wrong": slice(3, 7), "wrong": slice(7, 12)},
    "long tail": {"3 most frequent": slice(0, 3), "4 between": slice(3, 7), "3 rarest": slice(7, 10)},
}


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md."""
    cells = [cell for cell in content["cells"] if "died" not in cell]
    places = list(dict.fromkeys((cell["task"], cell["student"]) for cell in cells))
    heads = [", ".join(place) for place in places]
    names = [name for name in whole.METHODS if any(name in cell.get("found", {}) for cell in cells)]

    def of(kind: str, place: tuple[str, str]) -> list[Any]:
        return [c for c in cells if c["kind"] == kind and (c["task"], c["student"]) == place]

    def found(name: str, place: tuple[str, str]) -> list[Any]:
        return [cell["found"][name] for cell in of("accuracy", place) if name in cell["found"]]

    def rows(labels: Sequence[Any], entry: Any) -> list[list[str]]:
        return [[str(label), *(entry(label, place) for place in places)] for label in labels]

    def path(k: int, place: tuple[str, str]) -> str:
        known = found("whole training", place)
        loss, test = (mean(one[key][k] for one in known) for key in ("meta loss", "path")) if known else (0.0, 0.0)
        return f"{loss:.3f} ({test:.1f})"

    def smooth(key: tuple[str, str], place: tuple[str, str]) -> str:
        known = [cell["smooth"][key[0]][key[1]] for cell in of("smooth", place)]
        true = [one["change"] / one["predicted"] for one in known]
        return f"{spread([one['smoothness'] for one in known])} ({median(true):.2f})" if known else ""

    def difference(h: float, place: tuple[str, str]) -> str:
        known = [cell["differences"][f"{h:g}"] for cell in of("smooth", place)]
        return f"{max(known, key=lambda value: abs(value - 1)):.7g}" if known else ""

    def weights(place: tuple[str, str]) -> list[list[str]]:
        known = [one["weights"] for one in found("whole training", place)]
        return [
            [", ".join(place), label, *(f"{mean(w for one in known for w in one[k][part]):.2f}" for k in range(3))]
            for label, part in GROUPED[place[0]].items()
            if known
        ]

    def kept(name: str, place: tuple[str, str]) -> str:
        known = found(name, place)
        share = [f"{100 * mean(one[key] for one in known):.0f}" for key in ("kept", "right", "right of dropped")]
        return "{}: {}, {}".format(*share) if known else ""

    steps = cells[0]["steps"]
    ways = [(way, h) for way in ("groups", "samples", "groups, random") for h in ("0.1", str(whole.SIZE))]
    smoothness = [[f"{way}, h = {h}", *(smooth((way, h), place) for place in places)] for way, h in ways]
    costs = [
        [head, f"{cell['plain']:.2f} s",
         *(f"{cell[name] / cell['plain']:.1f}" for name in ("hypergradient", "one step ahead")),
         f"{cell['kept']:.1f} MB",
         *(f"{cell['memory'][n]['peak'] - cell['memory'][n]['before']:.1f} MB" for n in ("plain", "hypergradient"))]
        for head, place in zip(heads, places, strict=True) for cell in of("cost", place)
    ]  # fmt: skip
    larger = [
        [name, f"{size / 1e6:.2f} M", *(f"{12 * size * k / 1e9:.1f} GB" for k in (300, 10_000))]
        for name in ("resnet20", "resnet8x4", "transformer")
        for size in [sum(p.numel() for p in CASES[name].student().parameters())]
    ]
    by_sign = [name for name in names if name.startswith("samples")]
    text = TEXT.format(
        provenance=provenance(content), steps=steps, among=AMONG, outer=whole.OUTER, size=whole.SIZE,
        sources=str(TASKS["sources"].__doc__).splitlines()[0], tail=str(TASKS["long tail"].__doc__).splitlines()[0],
        seeds=", ".join(map(str, sorted({cell["seed"] for cell in cells}))),
        accuracy=table(["", *heads], rows(names, lambda n, p: spread([one["test"] for one in found(n, p)]))),
        path=table(["outer steps", *heads], rows(range(whole.OUTER + 1), path)),
        smooth=table(["v", *heads], smoothness),
        differences=table(["h", *heads], rows(whole.DIFFERENCES, difference)),
        weights=table(["", "group", "first", "second", "last"], [r for p in places for r in weights(p)], left=2),
        kept=table(["kept: right, right of dropped", *heads], rows(by_sign, kept)),
        cost=table(["", "plain training", "hypergradient", "one step ahead", *MEMORY], costs),
        larger=table(["student", "parameters", "300 steps", "10,000 steps"], larger),
    )  # fmt: skip
    return [write_readme(folder, text + what_failed(content, lambda c: f"{c['task']}, {c['student']}, {c['seed']}"))]


def main() -> None:
    """Measure the cells that are not in the record yet; then write the report."""
    parser = parser_of(__doc__, PRESETS, list(whole.METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(GROUPS))
    parser.add_argument("--students", nargs="+", choices=list(ACTIVATIONS), help="by their activation")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="of the training")
    args = parse(parser, PRESETS)
    keys = [
        {"task": task, "student": student, "seed": seed, "steps": args.steps}
        for task in args.tasks for student in args.students for seed in args.seeds
    ]  # fmt: skip
    jobs = [Job({"kind": "cost", **key}) for key in keys if key["seed"] == args.seeds[0]]
    jobs += [Job({"kind": "accuracy", **key}, args.methods) for key in keys]
    jobs += [Job({"kind": "smooth", **key}) for key in keys]
    for path in write(measure(args, whole, jobs).content, args.output):
        print(path)


if __name__ == "__main__":
    run(main)
