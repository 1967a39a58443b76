"""The proof on the user's own model: do a student's virtual passes compute what its real forward pass does?"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakd.derivatives import Gradients, gradients, leaves
from metakd.errors import MetaKDError
from metakd.estimators import Estimator
from metakd.estimators.memory import Memory
from metakd.estimators.tolerance import CANCELLED, tolerance_of
from metakd.estimators.verification import is_faint, nudged
from metakd.nest import tensors
from metakd.objective import Objective, weighted_mean
from metakd.reach import HOOKS, bare
from metakd.student import FunctionalStudent
from metakd.terms import Term
from metakd.train_pass import TrainPass
from metakd.weighting.base import positive_int

_SHAPES = 4  # of outputs, with all else the same; sequences may have another length in every batch


class Proofs:
    """Proves, once for each state of a balancer's parts, that its virtual passes compute what real ones do.

    Args:
        verify: True; a number n, to prove it again at every n-th hypergradient; False for never.

    Attributes:
        wanted: whether there is anything to prove.
        repeats: False where compiled code draws random numbers of its own, so that the lookahead takes its gradient
            from a virtual pass.

    Raises:
        MetaKDError: another `verify`.

    Examples:
        >>> Proofs(0)
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: verify is 0, it must be an integer of at least 1
    """

    def __init__(self, verify: bool | int) -> None:
        self.wanted, self.repeats = verify is not False, True
        self._period = None if isinstance(verify, bool) else positive_int(verify, "verify")
        self._proven: frozenset[tuple[Hashable, Hashable]] = frozenset()
        self._since = 0

    def give(
        self, objective: Objective, train: TrainPass, weights: Tensor, estimator: Estimator, memory: Memory
    ) -> None:
        """Give the proof if it is due, and have the estimator compare forward mode with reverse mode.

        Args:
            objective: whose first batch the real pass was over, too.
            train: the real pass.
            weights: (B, M) of the loss whose gradient is compared, detached.
            estimator: of the hypergradient.
            memory: of the estimator.

        Raises:
            MetaKDError: losses or gradients differ; the message names the term, or the parameters.
        """
        if not self._due(objective, train, estimator):
            return
        memory.compare = True
        try:
            _compare_passes(objective, train, weights)
        except _OtherLossesError:
            if not train.compiled:
                raise
            self.repeats = False

    def _due(self, objective: Objective, train: TrainPass, estimator: Estimator) -> bool:
        if not self.wanted or train.float16:
            return False
        stands_on = what_it_stands_on(objective.student, train.outputs, objective.terms, estimator)
        self._since += 1
        again = self._period is not None and self._since > self._period
        shapes = sum(parts == stands_on[0] for parts, _ in self._proven)
        if (stands_on in self._proven or shapes >= _SHAPES) and not again:
            return False
        self._proven, self._since = self._proven | {stands_on}, 1
        return True


class _OtherLossesError(MetaKDError):
    """A virtual pass gives other losses than the real one over the same batch."""


def what_it_stands_on(
    student: FunctionalStudent, outputs: Any, terms: Mapping[str, Term], estimator: Estimator
) -> tuple[Hashable, Hashable]:
    """What a proof holds for: modules, their modes and hooks, terms, estimator; and shapes of outputs.

    Examples:
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
    shapes = tuple((t.dtype, *t.shape[1:]) for t in tensors(outputs))
    return (modules, trained, tuple((name, _code(term)) for name, term in terms.items()), id(estimator)), shapes


def _hooks(module: nn.Module) -> Iterator[Hashable]:
    for kind in HOOKS:
        if hooks := module.__dict__.get(kind):
            yield kind, *(_code(hook) for hook in hooks.values())


def _code(function: Any) -> Hashable:
    """What tells one function from another, though it is made anew in every iteration."""
    found = bare(function)
    return id(found.__code__) if isinstance(found, types.FunctionType) else id(found)


def _compare_passes(objective: Objective, train: TrainPass, weights: Tensor) -> None:
    """Run the first inner step's pass virtually, and compare losses and gradient with those of the real pass."""
    theta = leaves(objective.student.detached())
    virtual = objective.losses(theta, 0)
    limit = max(tolerance_of(virtual), tolerance_of(train.losses))  # virtual passes may be the finer ones
    _compare_losses(train.losses.detach(), virtual.detach(), list(objective.terms), limit)
    take = train.gradient_of(weighted_mean(weights, train.losses), keep_graph=True)
    if take is None:
        return
    real, found = take(theta), gradients(weighted_mean(weights, virtual), theta)
    wrong = _other_gradients(real, found, limit)
    if wrong and not is_faint(real, theta, limit):
        _refuse(wrong)
    elif wrong:
        # A gradient that vanishes leaves nothing but rounding, which a few roundings of the parameters change as much.
        near = leaves(nudged(theta, limit))
        again = gradients(weighted_mean(weights, objective.losses(near, 0)), near)
        noise = {name: _norm(again[name], found[name]) for name in wrong}
        _refuse({name: sizes for name, sizes in wrong.items() if sizes.difference > 10 * noise[name]})


def _compare_losses(real: Tensor, virtual: Tensor, names: Sequence[str], limit: float) -> None:
    for k, name in enumerate(names):
        one, other = real[:, k].double(), virtual[:, k].double()
        difference = one - other
        floor = CANCELLED * len(one) ** 0.5  # of losses near zero rounding is all there is
        if bool(difference.norm() <= limit * (torch.maximum(one.norm(), other.norm()) + floor)):
            continue
        i = int(difference.abs().argmax())
        raise _OtherLossesError(
            f"a virtual pass over the training batch gives other losses than the real one: term {name!r}, sample {i}: "
            f"{other[i]:.6g} in place of {one[i]:.6g}. The student or the term draws from a random generator, keeps a "
            "counter or a cache, or changes a tensor, where virtual passes cannot follow. Keep such things as "
            "attributes or buffers of the module, draw from torch's default generator, and write to clones; or pass "
            "verify=False if no hypergradient needs to be exact"
        )


class _Sizes(NamedTuple):
    """Norms of a parameter's gradient in the real and in the virtual pass, and of their difference."""

    real: float
    virtual: float
    difference: float


def _other_gradients(real: Gradients, virtual: Gradients, limit: float) -> dict[str, _Sizes]:
    """The parameters whose gradients differ."""
    total = sum(_norm(g, None) ** 2 for g in real.values()) ** 0.5
    sizes = {
        name: _Sizes(_norm(one, None), _norm(virtual[name], None), _norm(one, virtual[name]))
        for name, one in real.items()
    }
    return {
        name: of
        for name, of in sizes.items()
        if not of.difference <= limit * max(of.real, of.virtual) + CANCELLED * limit * total
    }


def _norm(one: Tensor | None, other: Tensor | None) -> float:
    """Of the difference of two gradients; None is nothing."""
    if one is None or other is None:
        found = other if one is None else one
        return 0.0 if found is None else float(found.double().norm())
    return float((one.double() - other.double()).norm())


def _refuse(wrong: dict[str, _Sizes]) -> None:
    if not wrong:
        return
    said = [
        f"{name!r} ({of.virtual:.4g} in place of {of.real:.4g}, {of.difference / max(of.real, of.virtual):.0%} off)"
        for name, of in wrong.items()
    ]
    raise MetaKDError(
        "the gradient of a virtual pass differs from that of the real one although the losses are the same. Norms by "
        f"parameter: {', '.join(said[:4])}{', ...' if len(said) > 4 else ''}. The student or a term reads these "
        "parameters from a place where virtual passes cannot swap them: a tuple, an object of another package, a cache "
        "of what was computed from them. Read them as attributes of the module; or pass verify=False if no "
        "hypergradient needs to be exact"
    )
