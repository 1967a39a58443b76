"""README.md and the figure of `meta_set.py`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.digits import DIGITS
from benchmarks.common.markdown import provenance, spread, table, what_failed, write_readme
from benchmarks.common.meta_sets import BATCHES, NAMES, PAIRS
from benchmarks.common.numbers import Content
from benchmarks.longtail import methods
from benchmarks.longtail.fixed import Fixed
from metakd.monitor.plots._drawing import MARKERS, TERMS, new_figure

TEXT = """\
# How large a meta set, and how often a step

{provenance}

BiKD on the digits of `examples/cifar_lt_bikd.py --sources 0` ({student}, {epochs} epochs, batches of {batch}), with a
meta set of {sizes} images of each class and a step of the weight model in every iteration (k = 1) or after every fifth
(k = 5). {held} images a class are held back in all cases, so that teacher and training images are the same for all
sizes, and a larger meta set holds the smaller ones. A meta batch is the meta set, or {batch} images of it. Test
accuracy in percent after the last epoch, mean ± standard deviation over the seeds {seeds}.

The fair rival has the same images too: as training images, under fixed weights, and for balanced softmax among the
counts. An epoch of it is longer by these images. In the column "none" it has none of them, and the weight model stays
as it starts.

## Accuracy

{accuracy}

Learned weights over the rival with the same images, the mean ± standard deviation of each seed's difference:

{over}

## Noise

The cosine between two hypergradients of the weight model, at points of BiKD's training (k = 1, {held} images a class,
no decay of the learning rate), means ± standard deviations over the seeds. Each is a mean over {pairs} pairs of meta
sets drawn from the test images, which nothing is trained on, and over {batches} training batches.

- **other set**: the same training batch, two meta sets that share no image.
- **other batch**: the same meta set, two training batches.
- **other set, mean**: two meta sets that share no image, and on each the mean of {batches} batches' hypergradients, as
  `accumulate={batches}` takes it.

{noise}

![Accuracy and noise by size of the meta set](meta_set.png)
"""


def write(content: Content, folder: Path) -> list[Path]:
    """Write README.md and meta_set.png."""
    cells = of_kind(content, "accuracy")
    sizes = sizes_of(content)
    text = TEXT.format(
        provenance=provenance(content),
        student=DIGITS.student,
        batch=DIGITS.batch_size,
        epochs=", ".join(sorted({str(cell["epochs"]) for cell in cells})),
        sizes=", ".join(map(str, sizes)),
        held=max(sizes),
        seeds=", ".join(str(cell["seed"]) for cell in cells),
        accuracy=_accuracy(content),
        over=_over(content),
        pairs=PAIRS,
        batches=BATCHES,
        noise=_noise(content) + what_failed(content, lambda cell: f"seed {cell['seed']}"),
    )
    figure = folder / "meta_set.png"
    _draw(content, figure)
    return [write_readme(folder, text), figure]


def of_kind(content: Content, kind: str) -> list[dict[str, Any]]:
    """The cells of a kind that did not fail, by seed."""
    return sorted((c for c in content["cells"] if c["kind"] == kind and kind in c), key=lambda cell: int(cell["seed"]))


def sizes_of(content: Content) -> list[int]:
    """The sizes of the meta set, without the 0."""
    return list(of_kind(content, "accuracy")[0]["sizes"])


def accuracies(content: Content, name: str) -> list[list[float]]:
    """For no meta set and then each size, the accuracies in the order of the seeds."""
    cells = [cell["accuracy"][name] for cell in of_kind(content, "accuracy") if name in cell["accuracy"]]
    return [list(column) for column in zip(*cells, strict=True)]


def names(content: Content) -> list[str]:
    """The methods that were measured."""
    return [name for name in NAMES if accuracies(content, name)]


def title(name: str) -> str:
    """A method's name in tables."""
    method = methods.find(name)
    return method.title + (" + the images" if isinstance(method, Fixed) else "")


def _accuracy(content: Content) -> str:
    rows = [[title(name), *map(spread, accuracies(content, name))] for name in names(content)]
    return table(["images of each class", "none", *map(str, sizes_of(content))], rows)


def _over(content: Content) -> str:
    fixed = [name for name in names(content) if isinstance(methods.find(name), Fixed)]
    rows = []
    for name in names(content):
        for rival in fixed if name not in fixed else ():
            pairs = zip(accuracies(content, name)[1:], accuracies(content, rival)[1:], strict=True)
            rows.append([f"{title(name)}, over {title(rival)}", *(_difference(*pair) for pair in pairs)])
    return table(["images of each class", *map(str, sizes_of(content))], rows)


def _difference(own: Sequence[float], other: Sequence[float]) -> str:
    text = spread([a - b for a, b in zip(own, other, strict=True)])
    return text if text.startswith("-") else f"+{text}"


def _points(content: Content) -> list[str]:
    return sorted({point for cell in of_kind(content, "noise") for point in cell["noise"]}, key=int)


def columns(content: Content, point: str, kind: str) -> list[list[float]]:
    """For each size, the cosines of a kind at a point of training, in the order of the seeds."""
    return [list(column) for column in zip(*(c["noise"][point][kind] for c in of_kind(content, "noise")), strict=True)]


def _noise(content: Content) -> str:
    rows = [
        [f"{point}", kind, *map(spread, columns(content, point, kind))]
        for point in _points(content)
        for kind in of_kind(content, "noise")[0]["noise"][point]
    ]
    return table(["epochs trained", "cosine with", *map(str, sizes_of(content))], rows, left=2)


def _draw(content: Content, path: Path) -> None:
    sizes = sizes_of(content)
    figure, ((left, right),) = new_figure(1, 2, (10, 4.2), None)
    for i, name in enumerate(names(content)):
        own, style = accuracies(content, name), {"color": TERMS[1 + i], "marker": MARKERS[i]}
        errors = [statistics.stdev(column) if len(column) > 1 else 0 for column in own[1:]]
        # Side by side, so that the bars can be told apart.
        places = [size * 1.04 ** (i - 1.5) for size in sizes]
        left.errorbar(places, list(map(statistics.mean, own[1:])), errors, capsize=2, label=title(name), **style)
        if isinstance(methods.find(name), Fixed):
            label = f"{methods.find(name).title}, no images"
            left.axhline(statistics.mean(own[0]), color=TERMS[1 + i], linestyle="--", linewidth=0.9, label=label)
    for i, point in enumerate(_points(content)):
        means = [statistics.mean(column) for column in columns(content, point, "other set")]
        right.plot(sizes, means, color=TERMS[1 + i], marker=MARKERS[i], label=f"after {point} epochs")
    left.set(title="a student's accuracy", ylabel="test accuracy in percent")
    right.set(title="hypergradients by two meta sets", ylabel="cosine", ylim=(min(0.0, right.get_ylim()[0]), 1.02))
    for panel in (left, right):
        panel.set(xscale="log", xlabel="images of each class in a meta set", xticks=sizes, xticklabels=map(str, sizes))
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
