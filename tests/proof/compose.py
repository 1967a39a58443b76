"""A random inner loss: operations in a row, with weights and meta-parameters at random places among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.proof.losses import LOSSES
from tests.proof.operations.all import OPERATIONS
from tests.proof.registry import grid

OPERANDS = ("weights", "meta", "both", "constant")
BEFORE = ("", "m", "w", "m w", "w m")
ENDS = ("plain", "weighted", "target", "penalty")
RULES = ("sgd", "momentum", "adam", "rmsprop")


@dataclass(frozen=True)
class Stage:
    """One operation, what stands in its operand, and what meets the features before it."""

    operation: str
    operand: str = "weights"
    before: str = ""


@dataclass(frozen=True)
class Recipe:
    """All of a random problem; its `repr` makes it anew.

    Attributes:
        stages: the operations.
        loss: its name in `LOSSES`.
        end: where meta-parameters meet the loss: nowhere, as weights of the samples, in the target, or in a penalty.
        rule: the inner optimizer.
        steps: K.
        size: (B, D).
        seed: of all numbers.
        squashed: whether a tanh follows each operation.
        complex: whether weights and the matrix of meta-parameters are complex.
        learned_rate: whether the learning rate is a meta-parameter, too.
    """

    stages: tuple[Stage, ...]
    loss: str = "mse"
    end: str = "plain"
    rule: str = "sgd"
    steps: int = 1
    size: tuple[int, int] = (4, 3)
    seed: int = 0
    squashed: bool = False
    complex: bool = False
    learned_rate: bool = False

    @property
    def names(self) -> list[str]:
        """What it is made of, for the tally."""
        return [*(stage.operation for stage in self.stages), f"loss {self.loss}"]

    @property
    def by_autograd(self) -> bool:
        return any(OPERATIONS[stage.operation].by_autograd for stage in self.stages)

    @property
    def wrong_in_torch(self) -> bool:
        return any(OPERATIONS[stage.operation].wrong_in_torch for stage in self.stages)

    @property
    def coupled(self) -> bool:
        """Whether weights and meta-parameters both stand somewhere."""
        text = " ".join(f"{stage.operand} {stage.before}" for stage in self.stages)
        meta = self.learned_rate or self.end != "plain" or any(word in ("meta", "both", "m") for word in text.split())
        return meta and any(word in ("weights", "both", "w") for word in text.split())


def drawn(choose: Callable[[Sequence[Any]], Any]) -> Recipe:
    """A recipe by a function that picks one of several; the first of them are the simplest."""

    def stage() -> Stage:
        name = choose(list(OPERATIONS))
        operand = "weights" if OPERATIONS[name].needs_weights else choose(OPERANDS)
        return Stage(name, operand, choose(BEFORE))

    stages = tuple(stage() for _ in range(choose((1, 2, 3))))
    real = any(OPERATIONS[stage.operation].needs_weights for stage in stages)
    return Recipe(
        stages,
        loss=choose(list(LOSSES)),
        end=choose(ENDS),
        rule=choose(RULES),
        steps=choose((1, 2, 3)),
        size=(choose((4, 3, 5, 6)), choose((3, 4, 5))),
        seed=choose(range(1000)),
        squashed=choose((False, True)),
        complex=choose((False,) if real else (False, False, False, True)),
        learned_rate=choose((False, False, False, True)),
    )


@dataclass(frozen=True)
class Composed:
    """The bilevel problem of a recipe."""

    recipe: Recipe
    params: dict[str, Tensor] = field(init=False, default_factory=dict)
    meta_params: dict[str, Tensor] = field(init=False, default_factory=dict)
    batches: list[dict[str, Tensor]] = field(init=False, default_factory=list)
    target: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.recipe.seed)
        rows, width = self.recipe.size

        def draw(*shape: int, complex: bool = False) -> Tensor:
            dtype = torch.complex128 if complex else torch.float64
            return torch.randn(*shape, generator=generator, dtype=dtype)

        def matrix() -> Tensor:
            return 0.6 * draw(width, width, complex=self.recipe.complex)

        self.params.update({f"w{i}": matrix() for i in range(len(self.recipe.stages) + 1)})
        self.meta_params.update(mix=matrix(), scale=1 + 0.3 * draw(width), bias=0.5 * draw(width))
        if self.recipe.learned_rate:
            self.meta_params["rate"] = torch.tensor(0.2, dtype=torch.float64)
        self.batches.extend({"x": draw(rows, width), "y": draw(rows, width)} for _ in range(self.recipe.steps))
        self.target.update({name: draw(width, width) for name in self.params})

    def inner(self, p: dict[str, Tensor], m: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        z, y = batch["x"], batch["y"]
        p, m = ({name: real(value) for name, value in values.items()} for values in (p, m))
        for i, stage in enumerate(self.recipe.stages):
            for mark in stage.before.split():
                z = z * m["scale"] if mark == "m" else z @ p["w0"]
            answer = OPERATIONS[stage.operation].function(z, self._operand(stage, p[f"w{i + 1}"], m, z))
            z = self._features(answer, z)
        if self.recipe.end == "target":
            y = y + m["bias"]
        return self._reduced(LOSSES[self.recipe.loss](z, y), p, m, batch)

    @staticmethod
    def _operand(stage: Stage, w: Tensor, m: dict[str, Tensor], z: Tensor) -> Tensor:
        constant = grid(z.shape[1], z.shape[1])
        return {"weights": w, "meta": m["mix"], "both": w * m["mix"], "constant": constant}[stage.operand]

    def _features(self, answer: Tensor, z: Tensor) -> Tensor:
        """What an operation answers, as (B, D)."""
        answer = answer.reshape(len(z), -1)
        if self.recipe.squashed:
            answer = answer.tanh()
        if answer.shape[1] == z.shape[1]:
            return answer
        return answer @ grid(answer.shape[1], z.shape[1]) / answer.shape[1] ** 0.5

    def _reduced(self, loss: Tensor, p: dict[str, Tensor], m: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        if self.recipe.end == "weighted":
            weights = (batch["x"] @ m["mix"]).sum(1).sigmoid()
            return (weights * loss).mean()  # a scalar loss is weighted by the mean
        if self.recipe.end == "penalty":
            return loss.mean() + 0.1 * m["scale"].square().mean() * sum(w.square().sum() for w in p.values())
        return loss.mean()

    def outer(self, p: dict[str, Tensor], m: dict[str, Tensor]) -> Tensor:
        return sum(((real(p[name]) - self.target[name]) ** 2).mean() for name in p)


def real(value: Tensor) -> Tensor:
    """A function of complex numbers that feels both of their parts; real ones as they are."""
    return (value + 0.3 * value**2).real + 0.5 * value.imag if value.is_complex() else value
