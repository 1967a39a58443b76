"""The walk back through K inner steps, shared by `Adjoint` and its relatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakd._autodiff import Gradients, added, leaves, with_zeros
from metakd.batch import map_tensors, tensors
from metakd.estimators.answer import answer
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.inner import Params
from metakd.inner.repaired import only_scales

Products = Callable[[Problem, Params, Params, Any, Params], tuple[Gradients, Gradients]]
"""(problem, params, meta, batch, u) -> products of u with the inner loss's second derivatives, in params and in meta.

Missing names in params count as zero."""


class _Adjoints(NamedTuple):
    """Gradients of the outer loss in theta_t (by name) and in the state's floating-point tensors (in order)."""

    params: Params
    state: list[Tensor]


class _Kept(NamedTuple):
    """A step of the first sweep: its start and its gradient."""

    params: Params
    state: Any
    gradient: Gradients


class _Trail:
    """A stack of the first sweep's steps, on another device if asked.

    For several steps it allocates all memory before the sweep. Small copies between one step's large tensors and the
    next's would otherwise keep the allocator from reusing that memory.
    """

    def __init__(self, problem: Problem, steps: int, offload: torch.device | str | None) -> None:
        like = _Kept(problem.params, problem.optimizer_state, {**problem.params})
        count = steps if steps > 1 or offload is not None else 0
        self._rooms = [map_tensors(lambda t: torch.empty_like(t, device=offload), like) for _ in range(count)]
        self._steps: list[tuple[_Kept, list[torch.device]]] = []
        self._start = problem.params

    def push(self, step: _Kept) -> None:
        if not self._rooms:
            self._steps.append((step, []))
            return
        room = self._rooms.pop()
        present = {name: g for name, g in step.gradient.items() if g is not None}
        kept = _Kept(
            step.params if step.params is self._start else _copied(step.params, room.params),
            _copied(step.state, room.state),
            dict.fromkeys(step.gradient) | _copied(present, {name: room.gradient[name] for name in present}),
        )
        self._steps.append((kept, [t.device for t in tensors(step)]))

    def pop(self) -> _Kept:
        step, devices = self._steps.pop()
        if not devices:
            return step
        home = iter(devices)
        back: _Kept = map_tensors(lambda t: t.to(next(home)), step)
        return back


def _copied(value: Any, room: Any) -> Any:
    """The same nest, each tensor copied into the room's next tensor if that fits."""
    rooms = iter(tensors(room))

    def copy(t: Tensor) -> Tensor:
        place = next(rooms, None)
        fits = place is not None and place.shape == t.shape and place.dtype == t.dtype
        return place.copy_(t) if place is not None and fits else t

    return map_tensors(copy, value)


def walk_back(
    problem: Problem,
    horizon: int,
    *,
    first: Products,
    later: Products,
    offload: torch.device | str | None = None,
    params_gradient: bool = True,
) -> Hypergradient:
    """The hypergradient through the last `horizon` inner steps; it is exact through all of them.

    Args:
        problem: the bilevel problem.
        horizon: how many steps to walk back.
        first: the products at the earliest step, where the one in params is rarely needed.
        later: the products at the other steps.
        offload: the device that keeps the first sweep's steps; None to leave them in place.
        params_gradient: whether `later` is exact in params, so that the full walk also gives the gradient in theta_0.

    Raises:
        MetaKDError: there is no batch.
    """
    count = len(problem.batches)
    start = max(count - horizon, 0)
    trail = _Trail(problem, count - start, offload)
    params, state = problem.sweep(lambda t, *step: trail.push(_Kept(*step)) if t >= start else None)
    outer_loss, v, total = problem.outer_gradients(params)
    adjoints = _Adjoints(with_zeros(v, params), [torch.zeros_like(t) for t in _floats(state)])
    to_start = problem.wants_params_gradient and params_gradient and start == 0
    depends = any(value is not None for value in v.values())  # on the inner steps
    for t in reversed(range(start, count if depends else start)):
        products = averaged_in_params(later) if t > start or to_start else first
        adjoints, in_meta = _step_back(problem, t, trail.pop(), adjoints, products)
        total = added(total, in_meta)
    return answer(problem, outer_loss, total, params, state, adjoints.params if to_start else None)


def averaged_in_params(products: Products) -> Products:
    """The same products, with the one in params averaged over processes."""

    def averaged(problem: Problem, params: Params, *step: Any) -> tuple[Gradients, Gradients]:
        in_params, in_meta = products(problem, params, *step)
        return problem.of_all(in_params, params), in_meta

    return averaged


def _step_back(
    problem: Problem, t: int, kept: _Kept, adjoints: _Adjoints, products: Products
) -> tuple[_Adjoints, Gradients]:
    """The adjoints before step t, and the step's contribution to the hypergradient."""
    before, u, in_meta = _through_update(problem, kept, adjoints)
    if not u:
        return before, in_meta
    in_params, mixed = products(problem, kept.params, leaves(problem.meta_params), problem.batches[t], u)
    return _plus(before, in_params), added(in_meta, mixed)


def _plus(adjoints: _Adjoints, products: Gradients) -> _Adjoints:
    present = {name: product for name, product in products.items() if product is not None}
    params = {name: p + present[name] if name in present else p for name, p in adjoints.params.items()}
    return _Adjoints(params, adjoints.state)


def _through_update(problem: Problem, kept: _Kept, adjoints: _Adjoints) -> tuple[_Adjoints, Params, Gradients]:
    """Pull the adjoints back through one optimizer update; also gives the gradient's cotangent u."""
    if only_scales(optimizer := problem.optimizer(problem.meta_params)):
        along = {name: None if g is None else adjoints.params[name] for name, g in kept.gradient.items()}
        u = optimizer.update(along, kept.state, params=kept.params, inplace=False)[0]
        return adjoints, {name: a for name, a in u.items() if a is not None}, dict.fromkeys(problem.meta_params)
    theta, meta = leaves(kept.params), leaves(problem.meta_params)
    g = leaves({name: value for name, value in kept.gradient.items() if value is not None})
    state = map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, kept.state)
    # Theta' is theta plus the update, so its adjoint is theta's, too: that needs no graph.
    g_or_none = {name: g.get(name) for name in theta}
    updates, after = problem.optimizer(meta).update(g_or_none, state, params=theta, inplace=False)
    pairs = [(updates[name], adjoint) for name, adjoint in adjoints.params.items()]
    pairs += zip(_floats(after), adjoints.state, strict=True)
    moving = [(new, adjoint) for new, adjoint in pairs if new is not None and new.requires_grad]
    outputs, cotangents = [new for new, _ in moving], [adjoint for _, adjoint in moving]
    old = _floats(state)
    inputs = [*theta.values(), *old, *g.values(), *meta.values()]
    every = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True) if moving else [None] * len(inputs)
    found = iter(every)
    in_update: Gradients = {name: next(found) for name in theta}
    in_state = [torch.zeros_like(s) if (a := next(found)) is None else a for s in old]
    in_gradient = {name: next(found) for name in g}
    in_meta: Gradients = {name: next(found) for name in meta}
    u = {name: a for name, a in in_gradient.items() if a is not None}
    return _plus(_Adjoints(adjoints.params, in_state), in_update), u, in_meta


def _floats(state: Any) -> list[Tensor]:
    return [t for t in tensors(state) if t.is_floating_point()]
