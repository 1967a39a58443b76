"""A block that happens completely or not at all."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from metakd._basics.nest import same_values, tensors
from metakd._basics.together import clones, copy_into
from metakd._call.weight_step import WeightingStep
from metakd._virtual.contents import Contents
from metakd._virtual.functional import FunctionalStudent, put_back
from metakd.batch import Batch, detached_copy


class Snapshot:
    """Everything that a balancer's step may change in the user's objects, as it was before.

    It keeps the student's buffers, attributes and generators, the weight model and the terms' parameters with their
    gradients, the given dicts, and from `keep_optimizer()` on the weight model's optimizer. The student's parameters
    are never written to, but a virtual pass moves them out of their places.
    """

    def __init__(self, student: FunctionalStudent, step: WeightingStep, *contents: dict[str, Any]) -> None:
        self._step = step
        self._contents = [(d, dict(d)) for d in (vars(step), *contents)]
        self._put_optimizer_back: Callable[[], None] | None = None
        self._inputs: list[tuple[Tensor, int, Tensor]] = []
        self.start = student.start()
        modules = list(step.weighting.modules())
        self._put_lazy_parts_back = _keep_lazy_parts(modules)
        self._weighting_state = Contents(step.walk.places([step.weighting]))
        of_weighting = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        every = {id(t): t for t in (*of_weighting, *step.learned.named.values())}  # tied ones once
        kept = [t for t in every.values() if not is_lazy(t)]
        self._values = list(zip(kept, clones(kept), [t.grad for t in kept], strict=True))

    def keep_batch(self, batch: Batch) -> Batch:
        """A copy of the batch that a pass may write to."""
        kept = detached_copy(batch)
        pairs = zip(tensors(batch), tensors(kept), strict=True)
        self._inputs = [(t, t._version, value) for t, value in pairs if not t.is_inference()]
        return kept

    def keep_optimizer(self) -> None:
        """Keep the weight model's optimizer state; called right before its step."""
        if self._step.optimizer is not None:
            self._put_optimizer_back = _keep_optimizer(self._step.optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything, bit for bit."""
        put_back(self.start)
        for t, version, value in self._inputs:
            if t._version != version or not same_values(t, value):  # .data and NumPy leave the version as it is
                t.copy_(value)
        self._weighting_state.put_back()
        self._put_lazy_parts_back()
        copy_into([t for t, _, _ in self._values], [value for _, value, _ in self._values])
        for t, _, grad in self._values:
            t.grad = grad
        if self._put_optimizer_back is not None:
            self._put_optimizer_back()
        for now, old in self._contents:
            _refill(now, old)


@contextmanager
def all_or_nothing(snapshot: Snapshot) -> Iterator[None]:
    """Restore everything if the block raises an exception, Ctrl-C included."""
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def _keep_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Copy an optimizer's state; the returned function restores it into the same tensors."""
    every = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    copies = dict(zip(map(id, every), clones(every), strict=True))
    state = {
        p: {
            name: (value, copies[id(value)] if isinstance(value, Tensor) else copy.deepcopy(value))
            for name, value in held.items()
        }
        for p, held in optimizer.state.items()
    }
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def put_back() -> None:
        optimizer.state.clear()
        for p, held in state.items():
            optimizer.state[p] = {
                name: value.copy_(kept) if isinstance(value, Tensor) else copy.deepcopy(kept)
                for name, (value, kept) in held.items()
            }
        optimizer.param_groups[:] = [group for group, _ in groups]  # loading a state replaces the groups
        for group, kept in groups:
            _refill(group, kept)

    return put_back


def _refill(now: dict[Any, Any], old: dict[Any, Any]) -> None:
    for key in now.keys() - old.keys():
        del now[key]
    now.update(old)


def _keep_lazy_parts(modules: list[nn.Module]) -> Callable[[], None]:
    """Remember the lazy layers without sizes; the returned function makes them lazy again."""
    parts = [part for part in modules if isinstance(part, LazyModuleMixin)]
    contents = [(d, dict(d)) for part in parts for d in (vars(part), *vars(part).values()) if isinstance(d, dict)]
    unsized = [t for part in parts for t in (*part.parameters(False), *part.buffers(False)) if is_lazy(t)]
    empty = [(t, t.data) for t in unsized]
    classes: list[tuple[Any, type]] = [(owner, type(owner)) for owner in (*parts, *unsized)]

    def put_back() -> None:
        for now, old in contents:
            _refill(now, old)
        for t, data in empty:
            t.grad, t.data = None, data
        for owner, kind in classes:
            owner.__class__ = kind

    return put_back
