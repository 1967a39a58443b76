"""Real passes and virtual ones over the same batches: do they give the same losses and gradients?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from metakd._autodiff import Gradients, gradients, graph_nodes, leaves
from metakd._call.objective import Objective, weighted_mean
from metakd._call.train_pass import TrainPass
from metakd._proof.differences import check_gradients, check_losses
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.kernels import no_parametrization_cache, uncompiled
from metakd._virtual.precision import as_written
from metakd.batch import Batch, as_it_is
from metakd.errors import MetaKDError, blamed
from metakd.estimators.tolerance import tolerance_of
from metakd.inner import Params
from metakd.terms import Term

_MOVED = 0.05  # relative; far enough for a pass that takes no notice of it to give other losses
_AT_MOVED = 5e-3  # of gradients there; checkpoints of code that is not pure give slightly others when recomputed


class Compared(NamedTuple):
    """What a comparison without a difference found.

    Attributes:
        losses: (B, M) of the virtual pass over the first batch.
        hooked: whether the real passes hang hooks on activations.
    """

    losses: Tensor
    hooked: bool


class _Pass(NamedTuple):
    """A pass over a batch: the real one's terms, and the same losses as a function of the parameters."""

    what: str
    batch: Batch
    terms: Mapping[str, Term]
    virtual: Callable[[Params], Tensor]


class _Real(NamedTuple):
    """What a real pass gave: losses (B, M), the gradient of their sum with `_mixed` weights, at these parameters."""

    losses: Tensor
    gradient: Gradients
    params: Params
    limit: float


def compare_passes(objective: Objective) -> Compared | None:
    """Run the first inner steps' passes and the meta batch's both ways; compare losses and gradients.

    All passes but the first find the parameters moved: one that reads them from another place takes no notice of
    that, nor does one that keeps what it computed from them.

    Returns:
        None where a real pass ran in float16, whose losses virtual passes do not repeat.

    Raises:
        MetaKDError: they differ, a virtual pass fails, or a real pass writes to parameters.
    """
    objective = objective.opening()
    hooks = _Hooks()
    passes = [
        _Pass("the batch", step.batch, objective.terms, partial(objective.losses, step=step))
        for step in objective.steps
    ]
    passes.append(_Pass("the meta batch", objective.meta_batch, objective.meta_terms, objective.meta_losses))
    with objective.student.untouched() as start:
        reals = _real_passes(objective.student, passes, start, hooks)
        if reals is None:
            return None
        with as_written(objective.student.device_type):
            losses = [
                _compared(one, real, moved=t > 0) for t, (one, real) in enumerate(zip(passes, reals, strict=True))
            ]
    return Compared(losses[0], hooks.found)


def same_losses(one: Tensor, other: Tensor) -> bool:
    """Whether two passes gave the same losses, to rounding."""
    try:
        check_losses(one, other, [""] * one.shape[1], tolerance_of(one), "")
    except MetaKDError:
        return False
    return True


def _real_passes(student: FunctionalStudent, passes: list[_Pass], start: Start, hooks: _Hooks) -> list[_Real] | None:
    """The passes by the student itself, in order; those after the first with its parameters moved for the time."""
    trained, found, nodes = student.trainable(), list[_Real](), set[Any]()
    arrays = start.state.large_arrays
    start.state.guard_iterators()
    with _put_back(trained) as kept, _arrays_put_back(arrays) as values, uncompiled(student.module):
        for t, (what, batch, terms, _) in enumerate(passes):
            with hooks, no_parametrization_cache(), _no_autocast_cache():
                train = TrainPass(student.module, student, as_it_is(batch), terms, start, what=what)
            if train.float16:
                return None
            if t == 0:
                check_unwritten([name for name, p in trained.items() if not torch.equal(p, kept[name])])
                _check_arrays(arrays, values)
            _check_apart(train.losses, nodes)
            with as_written(student.device_type):
                gradient = train.last_gradient_of(_mixed(train.losses), trained)
            params = {name: p.clone() for name, p in student.detached().items()}
            found.append(_Real(train.losses.detach(), gradient, params, tolerance_of(train.losses)))
            _move(trained, seed=t)
    return found


def _compared(one: _Pass, real: _Real, *, moved: bool) -> Tensor:
    """The losses of a virtual pass, which are those of the real one, and so is their gradient."""
    theta = leaves(real.params)
    dtypes = "/".join(sorted({str(p.dtype) for p in theta.values()}))
    with blamed(f"a virtual pass in {dtypes} over {one.what}, unlike the real one"):
        virtual = one.virtual(theta)
        repeated = virtual if moved else one.virtual(theta)
    limit = max(tolerance_of(virtual), real.limit)  # virtual passes may be the finer ones
    where = f"{one.what}, with the parameters moved a little," if moved else one.what
    for losses in (virtual, repeated):  # what goes round in a circle may fit once
        check_losses(real.losses, losses.detach(), list(one.terms), limit, where)
    if moved:
        limit = max(limit, _AT_MOVED)
    if not moved or all(bool(g.isfinite().all()) for g in real.gradient.values() if g is not None):
        found = gradients(_mixed(virtual), theta)
        check_gradients(
            real.gradient, found, theta, lambda near: gradients(_mixed(one.virtual(near)), near), limit, where
        )
    return virtual.detach()


def _mixed(losses: Tensor) -> Tensor:
    """A weighted mean in which no two losses cancel, whatever their signs."""
    weights = 1 + 0.5 * torch.arange(losses.numel(), device=losses.device).cos()
    return weighted_mean(weights.view_as(losses).to(losses.dtype), losses)


class _Hooks(TorchFunctionMode):
    """A block that notices hooks on activations, which a gradient that is handed over would pass by."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in (Tensor.register_hook, Tensor.retain_grad)
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A block that finds no parameter cast by autocast before, and leaves none."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _put_back(params: Params) -> Iterator[Params]:
    """A block that may write to parameters; gives their values, and puts them back with their version counters.

    Else a graph of the user's on the same parameters would count as modified.
    """
    kept = {name: p.detach().clone() for name, p in params.items()}
    with ExitStack() as stack:
        for p in params.values():
            stack.enter_context(_unsafe_preserve_version_counter(p))
        try:
            yield kept
        finally:
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(kept[name])


@torch.no_grad()
def _move(params: Params, seed: int) -> None:
    """Change each parameter by a share of itself; what is all zero moves by less than networks start with."""
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        share = _MOVED * (3 * torch.rand(p.shape, generator=generator) - 1).to(p)  # so that the norm changes, too
        p.add_(share * (p if bool(p.any()) else _MOVED**2))


def check_unwritten(names: Sequence[str]) -> None:
    """See that a pass wrote to none of the parameters.

    Raises:
        MetaKDError: it did; naming those of these names.
    """
    if names:
        raise MetaKDError(
            f"a forward pass writes to parameters ({', '.join(names[:5])}), so that the step that is looked ahead is "
            "not the one that training takes. Change them after optimizer.step() in your loop, or make them buffers; "
            "where a first pass only sets them to a start, run it once before the first call"
        )


@contextmanager
def _arrays_put_back(arrays: Sequence[Any]) -> Iterator[list[Any]]:
    """A block that may write to NumPy arrays; gives their values, and puts them back."""
    kept = [array.copy() for array in arrays]
    try:
        yield kept
    finally:
        for array, value in zip(arrays, kept, strict=True):
            if array.flags.writeable:
                array[...] = value


def _check_arrays(arrays: Sequence[Any], kept: Sequence[Any]) -> None:
    for array, value in zip(arrays, kept, strict=True):
        if array.tobytes() != value.tobytes():
            raise MetaKDError(
                f"a forward pass writes to a NumPy array of {array.size} numbers, which virtual passes would change; "
                "keep it as a buffer: module.register_buffer(name, torch.from_numpy(array), persistent=False)"
            )


def _check_apart(losses: Tensor, nodes: set[Any]) -> None:
    """See that no pass goes on with another's graph; `nodes` are those of the passes before, and get this one's."""
    found = set(graph_nodes(losses))
    if any(not hasattr(node, "variable") for node in found & nodes):
        raise MetaKDError(
            "a forward pass uses a tensor that an earlier one has computed, with its graph: a cache of what comes from "
            "the parameters, which nothing empties when they move. Empty it at the start of forward, or detach what "
            "one pass keeps for the next; verify=False takes it as it is, which is exact only if it is meant to stay"
        )
    nodes |= found
