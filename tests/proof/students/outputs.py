"""Outputs of many types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tests.proof.students.registry import INGREDIENTS, Ingredient, Parts


class Outputs(NamedTuple):
    logits: Tensor
    more: Any = None


@dataclass
class Answer:
    logits: Tensor
    note: str = "note"


class OwnDict(dict):  # type: ignore[type-arg]
    @property
    def logits(self) -> Tensor:
        return self["logits"]  # type: ignore[no-any-return]


def outputs_as(wrap: Callable[[Tensor], Any], logits: Callable[[Any], Tensor]) -> Callable[[Parts], None]:
    def add(parts: Parts) -> None:
        parts.student.wrap, parts.logits.function = wrap, logits

    return add


for _name, _wrap, _logits in (
    ("outputs_mapping", lambda z: {"logits": z, "n": 3}, lambda o: o["logits"]),
    ("outputs_own_mapping", lambda z: OwnDict(logits=z), lambda o: o.logits),
    ("outputs_namedtuple", lambda z: Outputs(z, [z * 2]), lambda o: o.logits),
    ("outputs_dataclass", lambda z: Answer(z), lambda o: o.logits),
    ("outputs_list", lambda z: [z, None, "text"], lambda o: o[0]),
):
    INGREDIENTS[_name] = Ingredient(outputs_as(_wrap, _logits))
