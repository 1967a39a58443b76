"""Students of one teacher on the long-tailed digits of `examples/cifar_lt_bikd.py`."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.longtail.learned import Learned
from benchmarks.longtail.presets import Preset
from benchmarks.longtail.train import Cell, Where, data_of, teacher_of, trained
from metakd.longtail import LongTailed

DIGITS = Preset(
    "convnet16", "mlp32", teacher_epochs=60, epochs=150, teacher_batch_size=32, lr=0.05, batch_size=32,
    validation_per_class=10,
)  # fmt: skip
MILESTONES = (2 / 3, 5 / 6)


def accuracies(
    cell: Mapping[str, Any], choose: Callable[[str, LongTailed], tuple[Learned, LongTailed]]
) -> dict[str, float]:
    """Test accuracy by each of the cell's methods, all from one teacher and one start.

    Args:
        cell: its seed, epochs and methods.
        choose: (method's name, data) -> the method, and the data that it trains on.

    Returns:
        Name -> percent.
    """
    preset = replace(DIGITS, epochs=cell["epochs"], teacher_epochs=min(cell["epochs"], DIGITS.teacher_epochs))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        where = Where(None, False, Path(work), "cpu")
        at = Cell("digits", 20.0, "teacher", cell["seed"])
        data = data_of(at, preset, where)
        teacher, _ = teacher_of(at, preset, where, MILESTONES)
        for name in cell["methods"]:
            method, given = choose(name, data)
            one = at._replace(method=name.replace(" ", "-"))
            found[name] = trained(one, preset, where, teacher, given, method, MILESTONES)["test"]["overall"]
    return found
