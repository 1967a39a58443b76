"""The two orders of the weight model's and the student's step, by what a student makes of them."""

from collections.abc import Mapping
from typing import Any

from benchmarks.common.digits import accuracies
from benchmarks.longtail.learned import Learned
from benchmarks.longtail.methods import bikd

METHODS = {f"{order}, k = {k}": (order, k) for k in (1, 5) for order in ("sequential", "simultaneous")}


def accuracy_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy of the digits' student by BiKD with each order.

    Returns:
        accuracy: name -> percent.
    """

    def learned(name: str) -> Learned:
        order, k = METHODS[name]
        return Learned(name, bikd(accumulate=k, order=order))

    return {"accuracy": accuracies(cell, lambda name, data: (learned(name), data))}


CELLS = {"accuracy": accuracy_cell}
