"""A random student's parts, what an ingredient adds to them, and the registry of ingredients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES, FEATURES = 6, 3, 4


class Loose(nn.Module):
    """A module whose attributes may be anything."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Student(Loose):
    """A layer, stages that keep the width, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.stages = nn.ModuleList()
        self.wrap: Any = None

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.first(x))
        for stage in self.stages:
            z = stage(z)
        outputs = self.head(z)
        return outputs if self.wrap is None else self.wrap(outputs)


class Reader:
    """Finds the logits among a student's outputs; all that terms hold of the parts."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Tensor] = lambda outputs: outputs

    def __call__(self, outputs: Any) -> Tensor:
        return self.function(outputs)


@dataclass
class Parts:
    """What the ingredients of a recipe add to.

    Attributes:
        student: the network.
        terms: of the inner loss, beside a cross-entropy.
        meta_terms: added to the meta loss.
        logits: the logits among the student's outputs.
        watched: what a pass leaves outside of the student's modules.
        around: contexts that calls happen in.
        after_step: what the user's loop does after each step of the optimizer.
    """

    student: Student = field(default_factory=Student)
    terms: dict[str, Any] = field(default_factory=dict)
    meta_terms: list[Any] = field(default_factory=list)
    logits: Reader = field(default_factory=Reader)
    watched: list[Callable[[], Any]] = field(default_factory=list)
    around: list[Callable[[], Any]] = field(default_factory=list)
    after_step: list[Callable[[], Any]] = field(default_factory=list)

    def add(self, stage: nn.Module) -> None:
        self.student.stages.append(stage)

    @property
    def last(self) -> Any:
        return self.student.stages[-1]


@dataclass(frozen=True)
class Ingredient:
    """A part and what the reference has to know of it.

    Attributes:
        add: puts it into the parts.
        by_autograd: gradients are not the derivatives of the losses (hooks, detached parts): the reference is a double
            backward.
        carries: a pass reads what the one before it computed, a constant to autograd alone.
        slow: is drawn rarely.
    """

    add: Callable[[Parts], None]
    by_autograd: bool = False
    carries: bool = False
    slow: bool = False


INGREDIENTS: dict[str, Ingredient] = {}


def part(**options: Any) -> Callable[[Callable[[Parts], None]], Callable[[Parts], None]]:
    def register(add: Callable[[Parts], None]) -> Callable[[Parts], None]:
        INGREDIENTS[add.__name__] = Ingredient(add, **options)
        return add

    return register


class Stage(Loose):
    """A layer whose features another function makes."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.function = function
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, z: Tensor) -> Any:
        return self.function(self, z)


def stage(**options: Any) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    """A part that is one stage, by its function; options that are functions make members anew."""
    known = {name: options.pop(name) for name in ("by_autograd", "carries", "slow") if name in options}

    def register(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        def add(parts: Parts) -> None:
            parts.add(Stage(function, **{name: make() for name, make in options.items()}))

        INGREDIENTS[function.__name__] = Ingredient(add, **known)
        return function

    return register


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def size(z: Tensor) -> Tensor:
    return z.square().mean(1)
