"""Parameters of which most run only when slow tests do."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters; all but the `fast` ones carry the mark `slow`."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
