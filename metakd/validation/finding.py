"""`Finding`, and the subject of the checks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import nn

from metakd._virtual.functional import unwrap
from metakd.estimators import Estimator
from metakd.estimators.estimate import needs_forward_mode, needs_second_derivatives
from metakd.inner.groups import Optimizers

Level = Literal["error", "warning", "note"]

HANDLED = "Nothing to do"


@dataclass(frozen=True)
class Finding:
    """One thing to know about a student before it is trained.

    Attributes:
        level: `"error"`: it will raise in use; `"warning"`: it works, but costs time or may surprise; `"note"`:
            handled, or only worth knowing.
        where: the modules, parameters or groups concerned.
        problem: what about them.
        cure: what to do, if anything.
        forward_mode: False if it rules out forward-mode derivatives.

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


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings, errors first."""
    return sorted(findings, key=lambda finding: get_args(Level).index(finding.level))


Named = Sequence[tuple[str, nn.Module]]


class Subject(NamedTuple):
    """What is validated: the student without its wrappers, and its optimizer and estimator."""

    student: nn.Module
    optimizer: Optimizers | None
    estimator: Estimator | None
    modules: Named
    params: dict[str, nn.Parameter]

    @classmethod
    def of(cls, student: nn.Module, optimizer: Optimizers | None, estimator: Estimator | None) -> "Subject":
        """The subject with its modules and parameters by name, shared ones once."""
        bare = unwrap(student)
        return cls(student, optimizer, estimator, list(bare.named_modules()), dict(bare.named_parameters()))

    @property
    def differentiates_twice(self) -> bool:
        """Whether the estimator needs second derivatives, as any that is not given may."""
        return self.estimator is None or needs_second_derivatives(self.estimator)

    @property
    def needs_forward_mode(self) -> bool:
        """Whether the estimator has no other way."""
        return self.estimator is not None and needs_forward_mode(self.estimator)

    def layers(self, *types: type[nn.Module]) -> Named:
        """The modules of these types."""
        return [(name, module) for name, module in self.modules if isinstance(module, types)]

    def training(self, *types: type[nn.Module]) -> Named:
        """The modules of these types that are in train mode."""
        return [(name, module) for name, module in self.layers(*types) if module.training]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients."""
        return {name: p for name, p in self.params.items() if p.requires_grad}


def places(modules: Named) -> str:
    """Names and types of some modules, such as 'layers.0, layers.1, layers.2 and 2 more (Tanh)'."""
    kinds = dict.fromkeys(type(module).__name__ for _, module in modules)
    return f"{listed([name or 'the student' for name, _ in modules])} ({', '.join(kinds)})"


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
