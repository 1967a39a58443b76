"""The picture of internals.md: the rooms of metakd/, and which imports which, read from the imports themselves.

python docs/layout_figure.py
"""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).parent / "images" / "layout.svg"


class Room(NamedTuple):
    """A group of modules that the picture shows as one box.

    Attributes:
        title: its name in the picture.
        caption: what it does.
        modules: files and folders below metakd/, as `batch.py` and `terms/`.
        x: where its middle stands, in columns; its height in the picture follows from the imports.
        width: in columns.
        open: whether it takes parts of a user's own.
    """

    title: str
    caption: str
    modules: str
    x: float
    width: float = 0.86
    open: bool = False


ROOMS = {
    "names": Room("import metakd", "the public names, and nothing else", "__init__.py", 2, 2.86),
    "longtail": Room("longtail/", "long-tailed data,\nscores, resumption", "longtail/", 0),
    "monitor": Room("monitor/", "history, figures,\ndiagnose, loggers", "monitor/", 0),
    "recipes": Room("recipes/", "published methods as\nconfigured balancers", "recipes/", 1),
    "check": Room("check/", "check_hypergradient,\nand why it disagrees", "check/", 2),
    "balancer": Room("balancer", "owns state,\nknows no calculus", "balancer.py report.py", 1),
    "proof": Room("_proof/", "virtual passes against\nreal ones, once", "_proof/", 2),
    "call": Room("_call/", "the stations of one call,\nall or nothing", "_call/", 1),
    "validation": Room("validation/", "what is known before\nthe first step", "validation/", 2),
    "weighting": Room("weighting/", "weight models: features\nto weights (B, M)", "weighting/", 0, open=True),
    "estimators": Room("estimators/", "the hypergradient of\nany bilevel problem", "estimators/", 2, open=True),
    "terms": Room("terms/", "per-sample losses:\noutputs to (B,)", "terms/", 0, open=True),
    "virtual": Room("_virtual/", "a module as a pure\nfunction, without a trace", "_virtual/", 1),
    "inner": Room("inner/", "the differentiable step:\nonly door to TorchOpt", "inner/", 2),
    "constraints": Room("constraints/", "maps that keep meta-\nparameters in range", "constraints/", 3),
    "basics": Room(
        "basics",
        "Batch, MetaKDError, nests of tensors, derivatives by name",
        "batch.py meta_set.py errors.py _basics/ _autodiff.py",
        1.5,
        3.86,
    ),
}


def main() -> None:
    """Draw."""
    PICTURE.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "metakd"}):  # the same picture from the same imports, byte for byte
        draw(arrows(imports(ROOT / "metakd"))).savefig(PICTURE, metadata={"Date": None})


def imports(package: Path) -> dict[str, set[str]]:
    """For each module of a package the modules of the package that it imports, by path, as `terms/base.py`."""
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}

    def file_of(dotted: str) -> str | None:
        top, *inside = dotted.split(".")
        while top == package.name:
            stem = "/".join(inside)
            if found := {f"{stem}.py", f"{stem}/__init__.py".lstrip("/")} & files:
                return found.pop()
            inside.pop()
        return None

    found: dict[str, set[str]] = {}
    for name in sorted(files):
        dotted: list[str] = []
        for node in ast.walk(ast.parse((package / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                dotted += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                dotted += [alias.name for alias in node.names]
        found[name] = {path for path in map(file_of, dotted) if path} - {name}
    return found


def arrows(found: dict[str, set[str]], rooms: dict[str, Room] = ROOMS) -> dict[str, set[str]]:
    """For each room the rooms that it imports, without those that it reaches through another.

    Raises:
        ValueError: a module stands in no room or in two, or rooms import each other in a circle; the message has the
            modules.
    """
    where = {module: _room_of(module, rooms) for module in found}
    pairs = {(where[a], where[b]): (a, b) for a in found for b in sorted(found[a]) if where[a] != where[b]}
    direct = {room: {b for a, b in pairs if a == room} for room in rooms}
    try:
        order = list(TopologicalSorter(direct).static_order())
    except CycleError as error:
        circle = error.args[1][::-1]
        steps = ["{} imports {}".format(*pairs[a, b]) for a, b in pairwise(circle)]
        raise ValueError(f"rooms {circle} import each other: {', '.join(steps)}") from error
    reached: dict[str, set[str]] = {}
    for room in order:
        reached[room] = direct[room].union(*(reached[other] for other in direct[room]))
    return {room: {b for b in direct[room] if not any(b in reached[c] for c in direct[room])} for room in rooms}


def _room_of(module: str, rooms: dict[str, Room]) -> str:
    place = module.split("/")[0] + ("/" if "/" in module else "")
    inside = [name for name, room in rooms.items() if place in room.modules.split()]
    if len(inside) != 1:
        raise ValueError(f"metakd/{module} stands in the rooms {inside}; give it one in docs/layout_figure.py")
    return inside[0]


def draw(to: dict[str, set[str]], rooms: dict[str, Room] = ROOMS) -> Figure:
    """Boxes in layers, each above all that it imports."""
    layer: dict[str, int] = {}
    for room in TopologicalSorter(to).static_order():
        layer[room] = 1 + max((layer[other] for other in to[room]), default=-1)
    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.5, 3.5), ylim=(-0.75, max(layer.values()) + 0.4))
    axis.axis("off")
    for name, room in rooms.items():
        _box(axis, room, layer[name])
        for other in sorted(to[name]):
            arrow = _arrow(room, layer[name], rooms[other], layer[other])
            arrow.set_gid(f"{name}--{other}")
            axis.add_patch(arrow)
    axis.text(-0.44, -0.6, "An arrow: imports from. Orange: takes parts of your own.", fontsize=8.5, va="center")
    return figure


def _box(axis: Axes, room: Room, y: int) -> None:
    style = "round,pad=0,rounding_size=0.05"
    fill, line = ("#FCE6CC", "#D55E00") if room.open else ("#EAF1F7", "#0072B2")
    corner = room.x - room.width / 2, y - _HALF
    axis.add_patch(FancyBboxPatch(corner, room.width, 2 * _HALF, boxstyle=style, fc=fill, ec=line, zorder=2))
    lines = room.caption.count("\n") + 1
    axis.text(room.x, y + 0.085 * lines, room.title, fontsize=10.5, weight="bold", ha="center", va="center")
    axis.text(room.x, y - 0.085, room.caption, fontsize=8.5, ha="center", va="center", linespacing=1.15)


def _arrow(room: Room, y: int, other: Room, below: int) -> FancyArrowPatch:
    """Straight down where one stands above the other."""
    (left, right), (other_left, other_right) = _edge(room), _edge(other)
    low, high = max(left, other_left), min(right, other_right)
    narrower = min(room, other, key=lambda r: r.width)
    x = min(max(narrower.x, low), high)
    ends = (x, x) if low <= high else (right, other_left) if right < other_left else (left, other_right)
    points = (ends[0], y - _HALF), (ends[1], below + _HALF)
    return FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=10, color="#555555", shrinkA=0, shrinkB=0)


def _edge(room: Room) -> tuple[float, float]:
    """Where arrows may stand: a box's edge without its corners."""
    return room.x - room.width / 2 + 0.05, room.x + room.width / 2 - 0.05


_HALF = 0.31  # of a box's height, where layers are 1 apart


if __name__ == "__main__":
    main()
