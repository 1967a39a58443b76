"""The student's real passes that a proof compares with; its parameters are moved for the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from metakd._autodiff import Gradients
from metakd._call.lending import Lending
from metakd._call.objective import Objective, weighted_mean
from metakd._call.train_pass import TrainPass
from metakd._proof.demands import check_apart, check_disjoint, check_same_parameters, check_unwritten
from metakd._virtual.functional import FunctionalStudent, Start, put_back
from metakd._virtual.kernels import no_parametrization_cache, uncompiled
from metakd._virtual.precision import as_written
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.estimators.tolerance import tolerance_of
from metakd.inner import Params, as_real
from metakd.terms import Term

_MOVES = 0.05, 5e-4  # relative; far enough to change the losses of a pass that reads the right parameters


class Pass(NamedTuple):
    """A pass over a batch: the terms of the real pass, and the same losses as a function of the parameters."""

    what: str
    batch: Batch
    terms: Mapping[str, Term]
    virtual: Callable[[Params], Tensor]


def passes_of(objective: Objective) -> list[Pass]:
    """The passes over an objective's inner steps and over its meta batch."""

    def at_all(losses: Callable[..., Tensor]) -> Callable[[Params], Tensor]:
        """The losses at the student's and the terms' parameters, given together."""
        return lambda params: losses(params, meta_params=params)

    steps = [
        Pass("the batch", step.batch, objective.terms, at_all(partial(objective.losses, step=step)))
        for step in objective.steps
    ]
    meta = Pass("the meta batch", objective.meta_batch, objective.meta_terms, at_all(objective.meta_losses))
    return [*steps, meta]


class RealResult(NamedTuple):
    """A real pass's losses (B, M), gradient of their `uncancelled_mean`, all parameters and tolerance."""

    losses: Tensor
    gradient: Gradients
    params: Params
    limit: float


def real_passes(
    student: FunctionalStudent, passes: list[Pass], start: Start, hooks: Hooks, lending: Lending, learned: Params
) -> list[RealResult] | None:
    """Run the passes by the student itself, in order, each after the first with its parameters moved.

    `learned` are parameters of terms, which are moved as well.

    A moved pass reveals code that reads parameters from elsewhere. Some models fail away from their parameters, such as
    one with a matrix that must stay positive definite. Then the moves get smaller, at last zero, to see if the model
    itself fails.
    """
    check_disjoint(student.trainable())
    failures: list[Exception] = []
    for size in (*_MOVES, 0.0):
        for _ in range(2):
            try:
                found = _passes_moved_by(size, student, passes, start, hooks, lending, learned)
            except _MovedTooFarError as error:
                failures.append(error.failure)
                put_back(start)
            else:
                if len(failures) % 2:  # the same move works now, so it did not cause the failure
                    _raise_last(failures)
                failures.clear()  # their tracebacks hold this frame
                return found
    _raise_last(failures)


def _raise_last(failures: list[Exception]) -> NoReturn:
    """Raise the last one; no frame of its traceback holds it, so that nothing is left to the garbage collector."""
    failure = failures.pop()
    failures.clear()
    try:
        raise failure
    finally:
        del failure


class _MovedTooFarError(Exception):
    """A pass with moved parameters failed."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure


def _passes_moved_by(
    size: float,
    student: FunctionalStudent,
    passes: list[Pass],
    start: Start,
    hooks: Hooks,
    lending: Lending,
    learned: Params,
) -> list[RealResult] | None:
    trained, found, nodes = student.trainable(), list[RealResult](), set[Any]()
    both = {**trained, **learned}
    start.state.guard_iterators()
    with (
        _parameters_put_back(both),
        _arrays_put_back(start.state.large_arrays) as check_arrays,
        uncompiled(student.module),
    ):
        for t, (what, batch, terms, _) in enumerate(passes):
            values = {name: p.detach().clone() for name, p in both.items()}
            try:
                with hooks, no_parametrization_cache(), _no_autocast_cache(), lending.lend(batch) as own:
                    train = TrainPass(student.module, student, own, terms, start, what=what)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                if t == 0:
                    raise
                raise _MovedTooFarError(error) from error
            if train.float16:
                return None
            check_same_parameters(trained, student.trainable())
            check_unwritten([name for name, p in both.items() if not torch.equal(p, values[name])])
            check_arrays()
            check_apart(train.losses, nodes)
            with as_written(student.device_type):
                gradient = train.last_gradient_of(uncancelled_mean(train.losses), trained, learned)
            params = {name: student.cast(as_real(value)) for name, value in values.items()}
            found.append(
                RealResult(train.losses.detach(), gradient, params, tolerance_of(train.losses, other_kernels=True))
            )
            _move(both, size, seed=t)
    return found


def uncancelled_mean(losses: Tensor) -> Tensor:
    """A weighted mean whose weights all differ, so that no two losses cancel."""
    weights = 1 + 0.5 * torch.arange(losses.numel(), device=losses.device).cos()
    return weighted_mean(weights.view_as(losses).to(losses.dtype), losses)


class Hooks(TorchFunctionMode):
    """A block that notices hooks on activations: a gradient that is handed over would not run them."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in (Tensor.register_hook, Tensor.retain_grad)
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A block without cached casts of parameters, before and after."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _parameters_put_back(params: Params) -> Iterator[None]:
    """A block that may write to parameters; it restores their values, version counters and `requires_grad`.

    The counters matter: autograd would report the parameters as modified in a graph that the user still holds.
    """
    kept = [p.detach().clone() for p in params.values()]
    with ExitStack() as stack:
        for p in params.values():
            stack.enter_context(_unsafe_preserve_version_counter(p))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(params.values(), kept, strict=True):
                    p.requires_grad_()
                    p.copy_(value)


@torch.no_grad()
def _move(params: Params, size: float, seed: int) -> None:
    """Change each entry in place by a share of itself and of the mean size, so that small entries may change sign."""
    generator = torch.Generator().manual_seed(seed)
    for p in params.values() if size else ():
        uneven = 3 * torch.rand(p.shape, generator=generator) - 1  # its mean is not zero, so that norms change, too
        share = size * uneven.to(p)
        p.add_(share * (p + p.abs().mean()) if bool(p.any()) else share * _MOVES[0])


@contextmanager
def _arrays_put_back(arrays: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """A block that restores NumPy arrays; gives a function that raises if one was written to."""
    kept = [array.copy() for array in arrays]

    def check() -> None:
        for array, value in zip(arrays, kept, strict=True):
            if array.tobytes() != value.tobytes():
                raise MetaKDError(
                    f"a forward pass writes to a NumPy array of {array.size} numbers, which virtual passes would "
                    "change; keep it as a buffer: module.register_buffer(name, torch.from_numpy(array), "
                    "persistent=False)"
                )

    try:
        yield check
    finally:
        for array, value in zip(arrays, kept, strict=True):
            if array.flags.writeable:
                array[...] = value
