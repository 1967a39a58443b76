"""The proof on the user's own model: when are virtual passes compared with real ones, and what follows from it?"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from metakd._basics.nest import tensors
from metakd._basics.positive_int import positive_int
from metakd._call.objective import Objective
from metakd._call.train_pass import TrainPass
from metakd._proof.demands import check_unwritten
from metakd._proof.side_by_side import compare_passes, same_losses
from metakd._virtual.functional import FunctionalStudent
from metakd._virtual.reach import HOOKS, bare
from metakd.estimators import Estimator
from metakd.estimators.memory import Memory
from metakd.terms import Term

_VARIANTS = 4  # of shapes and switches, with all else the same; sequences may have another length in every batch


class Proofs:
    """Proves, once for each state of a balancer's parts, that its virtual passes compute what real ones do.

    Args:
        verify: True; a number n, to prove it again at every n-th hypergradient; False for never.

    Attributes:
        repeats: False where compiled code draws random numbers of its own, so that the lookahead takes its gradient
            from a virtual pass.
        hooked: whether a forward pass hangs hooks on activations; they are to see the user's backward pass.

    Raises:
        MetaKDError: another `verify`.

    Examples:
        >>> Proofs(0)
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: verify is 0, but must be an integer of at least 1
    """

    def __init__(self, verify: bool | int) -> None:
        self.repeats, self.hooked = True, False
        self._wanted = verify is not False
        self._period = None if isinstance(verify, bool) else positive_int(verify, "verify")
        self._proven: frozenset[tuple[Hashable, Hashable]] = frozenset()
        self._since = 0
        self._losses: Tensor | None = None

    def due(self, student: FunctionalStudent, inputs: Any, terms: Mapping[str, Term], estimator: Estimator) -> bool:
        """Whether a hypergradient from a batch with these inputs needs a proof first; counts it."""
        if not self._wanted:
            return False
        stands_on = what_it_stands_on(student, inputs, terms, estimator)
        self._since += 1
        again = self._period is not None and self._since > self._period
        variants = sum(parts == stands_on[0] for parts, _ in self._proven)
        if (stands_on in self._proven or variants >= _VARIANTS) and not again:
            return False
        self._proven, self._since = self._proven | {stands_on}, 1
        return True

    def give(self, objective: Objective, memory: Memory) -> None:
        """Compare the passes of an objective, and have the estimator compare forward mode with reverse mode.

        Raises:
            MetaKDError: losses or gradients differ; the message names the term, or the parameters.
        """
        found = compare_passes(objective)
        if found is None:
            return
        memory.compare = memory.compare_products = True
        self._losses, self.hooked = found.losses, self.hooked or found.hooked

    def see(self, train: TrainPass) -> None:
        """Look at the training pass of a call.

        A compiled one is compared with the virtual one of the proof, which ran it as written.

        Raises:
            MetaKDError: it wrote to parameters.
        """
        if self._wanted:
            check_unwritten(train.written)
        losses, self._losses = self._losses, None
        if losses is not None and train.compiled and not train.float16:
            self.repeats = self.repeats and same_losses(train.losses, losses)


def what_it_stands_on(
    student: FunctionalStudent, inputs: Any, terms: Mapping[str, Term], estimator: Estimator
) -> tuple[Hashable, Hashable]:
    """What a proof holds for: modules, their modes and hooks, terms, estimator; and shapes of inputs and switches.

    Switches are attributes of the user's own modules that are True, False, None or text.

    Examples:
        >>> import torch
        >>> layer = nn.Dropout()
        >>> net = FunctionalStudent(nn.Sequential(nn.Linear(1, 1), layer))
        >>> before = what_it_stands_on(net, torch.ones(2, 3), {}, None)
        >>> before == what_it_stands_on(net, torch.ones(5, 3), {}, None)
        True
        >>> _ = layer.eval()
        >>> before == what_it_stands_on(net, torch.ones(5, 3), {}, None)
        False
    """
    modules = tuple((id(m), m.training, *_hooks(m)) for m in student.module.modules())
    trained = tuple((id(p), p.requires_grad, p.dtype) for p in student.module.parameters())
    shapes = tuple((t.dtype, *t.shape[1:]) for t in tensors(inputs))
    switches = tuple(
        (name, value)
        for m in student.module.modules()
        if not type(m).__module__.startswith("torch.")
        for name, value in vars(m).items()
        if value is None or type(value) in (bool, str)
    )
    called = tuple((name, _code(term)) for name, term in terms.items())
    return (modules, trained, called, id(estimator)), (shapes, switches)


def _hooks(module: nn.Module) -> Iterator[Hashable]:
    for kind in HOOKS:
        if hooks := module.__dict__.get(kind):
            yield kind, *(_code(hook) for hook in hooks.values())


def _code(function: Any) -> Hashable:
    """What tells one function from another, though it is made anew in every iteration."""
    found = bare(function)
    return id(found.__code__) if isinstance(found, types.FunctionType) else id(found)
