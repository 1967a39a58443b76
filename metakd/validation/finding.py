"""`Finding`, and what the checks look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from metakd.estimators import Estimator
from metakd.inner.groups import Optimizers
from metakd.student import unwrap

Level = Literal["error", "warning", "note"]

HANDLED = "Nothing to do"


@dataclass(frozen=True)
class Finding:
    """One thing to know about a student before it is trained.

    Attributes:
        level: `"error"`: it will raise in use; `"warning"`: it works, but costs time or is not what one may think;
            `"note"`: handled, or only worth knowing.
        where: the modules, parameters or groups concerned.
        problem: what about them.
        cure: what to do, if anything.
        forward_mode: False where it rules out forward-mode derivatives.

    Examples:
        >>> print(Finding("note", "2 of 8 parameters", "they are frozen", "Nothing to do"))
        2 of 8 parameters: they are frozen. Nothing to do.
    """

    level: Level
    where: str
    problem: str
    cure: str
    forward_mode: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.cure}."


Named = Sequence[tuple[str, nn.Module]]


class Subject(NamedTuple):
    """What is validated, the student looked through its wrappers."""

    student: nn.Module
    optimizer: Optimizers | None
    estimator: Estimator | None
    modules: Named
    params: dict[str, nn.Parameter]

    @classmethod
    def of(cls, student: nn.Module, optimizer: Optimizers | None, estimator: Estimator | None) -> "Subject":
        """The subject with its modules and parameters by name; shared ones once."""
        bare = unwrap(student)
        return cls(student, optimizer, estimator, list(bare.named_modules()), dict(bare.named_parameters()))

    def layers(self, *types: type[nn.Module]) -> Named:
        """The modules of these types."""
        return [(name, module) for name, module in self.modules if isinstance(module, types)]

    def training(self, *types: type[nn.Module]) -> Named:
        """Those of them that are in train mode."""
        return [(name, module) for name, module in self.layers(*types) if module.training]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that ask for gradients."""
        return {name: p for name, p in self.params.items() if p.requires_grad}


def places(modules: Named) -> str:
    """Where some modules are, and what they are.

    Examples:
        >>> places([(f"layers.{i}", nn.Tanh()) for i in range(5)])
        'layers.0, layers.1, layers.2 and 2 more (Tanh)'
    """
    kinds = dict.fromkeys(type(module).__name__ for _, module in modules)
    return f"{listed([name or 'the student' for name, _ in modules])} ({', '.join(kinds)})"


def listed(names: Sequence[str]) -> str:
    """The first few of some names.

    Examples:
        >>> listed(["a", "b"])
        'a, b'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
