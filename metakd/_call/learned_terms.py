"""The parameters of terms that are learned beside the weight model's."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import Params
from metakd.errors import MetaKDError
from metakd.terms.base import nested


class LearnedTerms:
    """The own parameters of terms that are modules, by name: "terms.<term>.<parameter>".

    Parameters that others train (the student's, the teacher's, those in the student's optimizer) are not among them.

    Args:
        terms: by name.
        student: whose parameters are not the terms'.
        others: further parameters that are not the terms', such as those of the student's optimizer.
        weighting: the weight model, which must not share a parameter with a term.

    Raises:
        MetaKDError: a parameter has no size yet, or is the weight model's as well; or two have the same name.

    Examples:
        >>> found = LearnedTerms({"hard": nn.Linear(1, 1), "soft": nn.Tanh()}, nn.Tanh(), [], nn.Tanh())
        >>> list(found.params())
        ['terms.hard.weight', 'terms.hard.bias']
    """

    def __init__(
        self, terms: Mapping[str, Any], student: nn.Module, others: Iterable[Tensor], weighting: nn.Module
    ) -> None:
        known = {id(p) for p in (*student.parameters(), *others)}
        of_weighting = {id(p) for p in weighting.parameters()}
        terms = {name: nested(term)[-1] for name, term in terms.items()}
        self._terms = [term for term in terms.values() if isinstance(term, nn.Module)]
        self.named: dict[str, nn.Parameter] = {}
        for term, module in terms.items():
            for own, p in module.named_parameters() if isinstance(module, nn.Module) else ():
                name = f"terms.{term}.{own}"
                if id(p) in known:
                    continue
                if id(p) in of_weighting or name in self.named:
                    what = "the weight model's parameter as well" if id(p) in of_weighting else "the name of two"
                    raise MetaKDError(f"{name} is {what}; give each its own parameter, and its own name")
                if is_lazy(p):
                    raise MetaKDError(f"{name} has no size yet; call the term once before it goes into the balancer")
                known.add(id(p))
                self.named[name] = p

    def params(self) -> dict[str, Tensor]:
        """Those that require gradients, by name."""
        return {name: p for name, p in self.named.items() if p.requires_grad}

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Move or cast terms as `nn.Module.to` does; of a term that holds others' parameters, its own ones alone."""
        own = {id(p) for p in self.named.values()}
        for term in self._terms:
            if all(id(p) in own for p in term.parameters()):
                term.to(*args, **kwargs)
        for p in self.named.values():
            p.data = p.data.to(*args, **kwargs)

    def values(self) -> dict[str, Tensor]:
        """Copies of all, by name."""
        return {name: p.detach().clone() for name, p in self.named.items()}

    def swaps(self, values: Params | None) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a parameter and what replaces it in a pass."""
        return [(p, values[name]) for name, p in self.named.items() if name in values] if values else []
