"""A balancer in float64: its hypergradient as training computes it, and the outcome of real steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metakd._basics.module_call import call
from metakd._basics.nest import map_tensors
from metakd._call.arguments import check_whole
from metakd._call.evaluate import checked_losses, evaluate_weights
from metakd._call.objective import weighted_mean
from metakd._call.ranks import Ranks
from metakd._call.train_pass import TrainPass
from metakd._virtual.functional import FunctionalStudent, Start, put_back
from metakd._virtual.precision import as_written
from metakd._virtual.swapping import with_parameters
from metakd.balancer import BilevelLossBalancer
from metakd.batch import Batch, detached_copy
from metakd.estimators import Estimator
from metakd.estimators.estimate import estimate, solved
from metakd.inner import Params, apply
from metakd.weighting.features import evaluate_features


class Candidate(NamedTuple):
    """A hypergradient, and the function whose gradient it should be.

    Attributes:
        gradient: in the weight model's parameters, computed exactly as training does.
        meta_params: these parameters.
        outer_after_inner: meta_params -> the meta loss after K real steps of the student itself.
    """

    gradient: Params
    meta_params: Params
    outer_after_inner: Callable[[Params], float]


@contextmanager
def in_float64(
    balancer: BilevelLossBalancer, batches: Sequence[Any], meta_batch: Any, estimator: Estimator
) -> Iterator[Candidate]:
    """A block with a balancer's hypergradient in float64; afterwards everything is bit for bit as before.

    One batch follows a call: real forward pass, lookahead from its graph, influence of each loss, weight model. Several
    batches follow `meta_step`. With several processes it is this process's own problem.
    """
    check_whole(balancer.student)
    with balancer._untouched() as start, torch.enable_grad():
        known = [balancer._batch(batch, f"batch {t}") for t, batch in enumerate(batches)]
        meta = balancer._batch(meta_batch, "the meta batch", balancer.meta_loss)
        balancer._problem_in_phi(balancer._objective(balancer._functional, known, meta, start))  # sizes lazy layers
        model = balancer.weighting
        tensors = [*(t for *_, t in start.state.tensors), *model.parameters(), *model.buffers()]
        known, meta = double(known), double(meta)
        with (
            doubled(tensors),
            as_written(balancer._functional.device_type),
            _as_one_process(balancer, estimator) as student,
            student.untouched() as begin,
        ):
            steps = _RealSteps(balancer, known, meta, begin)
            compute = _gradient_of_call if len(known) == 1 else _gradient_of_meta_step
            gradient = compute(balancer, known, meta, begin)
            phi = {name: p.detach() for name, p in balancer._step.params().items()}
            yield Candidate(gradient, phi, steps)


def _gradient_of_call(balancer: BilevelLossBalancer, batches: list[Batch], meta_batch: Batch, start: Start) -> Params:
    student = balancer._functional
    balancer._prove(batches, meta_batch)
    train = TrainPass(student.module, student, detached_copy(batches[0]), balancer.terms, start)
    features = evaluate_features(balancer.features, train.losses, train.outputs, batches[0])
    with student.untouched() as end:
        objective = balancer._objective(student, batches, meta_batch, start, end)
        weights, _, result = balancer._look_ahead(objective, train, features, moves=True)
        gradient = balancer._step.pull_back(weights, result.gradient)
    put_back(start)
    return gradient


def _gradient_of_meta_step(
    balancer: BilevelLossBalancer, batches: list[Batch], meta_batch: Batch, start: Start
) -> Params:
    objective = balancer._objective(balancer._functional, batches, meta_batch, start)
    problem = balancer._problem_in_phi(objective)
    balancer._prove(batches, meta_batch)
    return estimate(balancer.estimator, problem).gradient


@contextmanager
def _as_one_process(balancer: BilevelLossBalancer, estimator: Estimator) -> Iterator[FunctionalStudent]:
    """A block in which the balancer has this estimator, and its student the present dtype and no other process."""
    owners: list[dict[str, Any]] = [*map(vars, (balancer, balancer._memory, balancer._proofs))]
    kept = [dict(owner) for owner in owners]
    try:
        balancer.estimator = estimator
        balancer._functional = balancer._as_function()
        balancer._ranks = Ranks(balancer._functional.module)
        yield balancer._functional
    finally:
        for owner, values in zip(owners, kept, strict=True):
            owner.clear()
            owner.update(values)


class _RealSteps:
    """phi -> the meta loss after real steps: the student's own forward passes, its parameters written to."""

    def __init__(self, balancer: BilevelLossBalancer, batches: list[Batch], meta_batch: Batch, start: Start) -> None:
        self._balancer, self._batches, self._meta_batch, self._start = balancer, batches, meta_batch, start
        self._features: dict[int, Tensor] = {}
        problem = balancer._problem_in_phi(balancer._objective(balancer._functional, batches, meta_batch, start))
        self._moving = list(solved(balancer.estimator, problem).params)
        self._optimizer, self._state = problem.optimizer(problem.meta_params), problem.optimizer_state

    def __call__(self, meta_params: Params) -> float:
        student, learned = self._balancer._functional, self._balancer._step.learned.params()
        variables, state = student.trainable(), self._state
        values = {name: p.data for name, p in variables.items()}
        in_place = {name: p.data for name, p in learned.items()}
        put_back(self._start)
        try:
            for name, p in learned.items():
                p.data = meta_params[name]
            for t, batch in enumerate(self._batches):
                gradient = self._gradient(meta_params, t, batch)
                with torch.no_grad():
                    ahead, state = apply(self._optimizer, gradient, state, student.detached())
                for name, p in variables.items():
                    p.data = torch.view_as_complex(ahead[name]) if p.is_complex() else ahead[name]
            meta = detached_copy(self._meta_batch)
            with torch.no_grad():
                outputs = call(student.module, meta.inputs)
                losses = checked_losses({"meta_loss": self._balancer.meta_loss}, outputs, meta, "the meta batch")
                return float(losses.mean())
        finally:
            for name, p in variables.items():
                p.data = values[name]
            for name, p in learned.items():
                p.data = in_place[name]
            put_back(self._start)

    def _gradient(self, meta_params: Params, t: int, batch: Batch) -> dict[str, Tensor | None]:
        balancer, student = self._balancer, self._balancer._functional
        train = TrainPass(student.module, student, detached_copy(batch), balancer.terms, self._start)
        if t not in self._features:  # constant in phi, like the weight model's detached inputs
            self._features[t] = evaluate_features(balancer.features, train.losses, train.outputs, batch)
        model = balancer.weighting
        with with_parameters(model, meta_params), torch.no_grad():
            weights = evaluate_weights(model, self._features[t], batch, train.losses)
        found = train.last_gradient_of(weighted_mean(weights, train.losses), self._moving)
        return {name: found.get(name) for name in student.trainable()}


@contextmanager
def doubled(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A block in which these tensors hold float64 (complex128) values; afterwards they hold their old values.

    Examples:
        >>> w = torch.ones(2)
        >>> with doubled([w]):
        ...     print(w.dtype)
        torch.float64
        >>> w.dtype
        torch.float32
    """
    floating = {id(t): t for t in tensors if not is_lazy(t) and t.is_leaf and (t.is_floating_point() or t.is_complex())}
    kept = [(t, t.data, t.grad) for t in floating.values()]
    try:
        for t, value, _ in kept:
            t.grad = None
            t.data = double(value)
        yield
    finally:
        for t, value, grad in kept:
            t.grad = None
            t.data = value
            t.grad = grad


def double(value: Any) -> Any:
    """A nest with floating-point tensors in float64 and complex ones in complex128."""

    def finer(t: Tensor) -> Tensor:
        return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t

    return map_tensors(finer, value)
