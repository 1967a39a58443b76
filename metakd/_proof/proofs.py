"""The proof on the user's own model: when it is due, and what follows from it."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from metakd._basics.nest import tensors
from metakd._basics.positive_int import positive_int
from metakd._call.lending import Lending
from metakd._call.objective import Objective
from metakd._call.ranks import Ranks
from metakd._call.train_pass import TrainPass
from metakd._proof.demands import check_unwritten
from metakd._proof.shards import compare_shards
from metakd._proof.side_by_side import compare_passes, same_losses
from metakd._virtual.functional import FunctionalStudent
from metakd._virtual.kernels import compiled_parts
from metakd._virtual.reach import HOOKS, bare
from metakd._virtual.sharded import ShardedStudent
from metakd.estimators import Estimator
from metakd.estimators.estimate import needs_second_derivatives
from metakd.estimators.memory import Memory
from metakd.estimators.tolerance import full_float32
from metakd.terms import Term

_VARIANTS = 4  # proofs per combination of shapes and switches: the length of sequences may change in every batch


class Proofs:
    """Proves, once per state of a balancer's parts, that virtual passes compute what real passes do.

    Args:
        verify: True; a number n to repeat the proof at every n-th hypergradient; False for never.

    Attributes:
        repeats: False if compiled code draws its own random numbers; the lookahead's gradient is then a virtual pass's.
        hooked: whether a forward pass registers hooks on activations, which must see the user's backward pass.
        may_be_float16: whether a forward pass may run in float16 on its own; False once a proof has seen otherwise.
        draws: whether passes draw random numbers; None until a proof has seen it.
        lending: gives passes copies of their batches, until a proof has seen that they only read.

    Raises:
        MetaKDError: another `verify`.
    """

    def __init__(self, verify: bool | int) -> None:
        self.repeats, self.hooked, self.may_be_float16, self.lending = True, False, True, Lending()
        self.draws: bool | None = None
        self._wanted = verify is not False
        self._period = None if isinstance(verify, bool) else positive_int(verify, "verify")
        self._proven: frozenset[tuple[Hashable, Hashable]] = frozenset()
        self._since = 0
        self._losses: Tensor | None = None

    def due(self, student: FunctionalStudent, inputs: Any, terms: Mapping[str, Term], estimator: Estimator) -> bool:
        """Whether the next hypergradient needs a proof first; counts hypergradients."""
        if not self._wanted:
            return False
        key = proof_key(student, inputs, terms, estimator)
        self._since += 1
        again = self._period is not None and self._since > self._period
        variants = sum(parts == key[0] for parts, _ in self._proven)
        if (key in self._proven or variants >= _VARIANTS) and not again:
            return False
        self._proven, self._since = self._proven | {key}, 1
        return True

    def key(self, *parts: Any) -> Hashable:
        """See `proof_key`."""
        return proof_key(*parts)

    def prove(self, objective: Objective, memory: Memory, ranks: Ranks, estimator: Estimator) -> None:
        """Compare an objective's passes with real ones, and tell the estimator to compare its derivatives.

        Raises:
            MetaKDError: losses or gradients differ.
        """
        if isinstance(objective.student, ShardedStudent):
            compare_shards(objective, ranks, forward_mode=needs_second_derivatives(estimator))
            return
        self.lending.only_read, self.lending.compares = False, True
        try:
            with nullcontext() if compiled_parts(objective.student.module) else full_float32():  # or it compiles anew
                found, self.may_be_float16 = compare_passes(objective), True
        finally:
            self.lending.compares = False
        if found is None:
            return
        self.lending.only_read, self.may_be_float16 = not self.lending.written, False
        memory.compare = memory.compare_products = True
        self._losses, self.hooked = found.losses, self.hooked or found.hooked
        self.draws = self.draws or found.draws

    def check_train_pass(self, train: TrainPass) -> None:
        """Check a call's training pass: it must not write to parameters.

        A compiled pass is also compared with the proof's virtual pass, which ran the Python code.
        """
        if self._wanted:
            check_unwritten(train.written)
        losses, self._losses = self._losses, None
        if losses is not None and train.compiled and not train.float16:
            self.repeats = self.repeats and same_losses(train.losses, losses)


def proof_key(
    student: FunctionalStudent, inputs: Any, terms: Mapping[str, Term], estimator: Estimator
) -> tuple[Hashable, Hashable]:
    """What a proof is valid for: modules with modes and hooks, terms and estimator; and shapes of inputs and switches.

    Switches are attributes of the user's modules that are True, False, None or strings.

    Examples:
        >>> import torch
        >>> layer = nn.Dropout()
        >>> net = FunctionalStudent(nn.Sequential(nn.Linear(1, 1), layer))
        >>> before = proof_key(net, torch.ones(2, 3), {}, None)
        >>> before == proof_key(net, torch.ones(5, 3), {}, None)
        True
        >>> _ = layer.eval()
        >>> before == proof_key(net, torch.ones(5, 3), {}, None)
        False
    """
    every = list(student.module.modules())
    modules = tuple((id(m), m.training, *_hooks(m)) for m in every)
    trained = tuple((id(p), p.requires_grad, p.dtype) for p in student.named().values())
    shapes = tuple((t.dtype, *t.shape[1:]) for t in tensors(inputs))
    switches = tuple(
        (name, value)
        for m in every
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
    """An identity of a function's code: users create lambdas anew in every iteration."""
    found = bare(function)
    return id(found.__code__) if isinstance(found, types.FunctionType) else id(found)
