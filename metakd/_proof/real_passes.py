"""The passes of the student itself that a proof compares with, its parameters moved for the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from metakd._autodiff import Gradients
from metakd._call.objective import weighted_mean
from metakd._call.train_pass import TrainPass
from metakd._proof.demands import check_apart, check_disjoint, check_same_parameters, check_unwritten
from metakd._virtual.functional import FunctionalStudent, Start, put_back
from metakd._virtual.kernels import no_parametrization_cache, uncompiled
from metakd._virtual.precision import as_written
from metakd.batch import Batch, as_it_is
from metakd.errors import MetaKDError
from metakd.estimators.tolerance import tolerance_of
from metakd.inner import Params
from metakd.terms import Term

_MOVES = 0.05, 5e-4  # relative; far enough for a pass that takes no notice of it to give other losses


class Pass(NamedTuple):
    """A pass over a batch: the real one's terms, and the same losses as a function of the parameters."""

    what: str
    batch: Batch
    terms: Mapping[str, Term]
    virtual: Callable[[Params], Tensor]


class Real(NamedTuple):
    """What a real pass gave: losses (B, M), the gradient of their sum with `mixed` weights, at these parameters."""

    losses: Tensor
    gradient: Gradients
    params: Params
    limit: float


def real_passes(student: FunctionalStudent, passes: list[Pass], start: Start, hooks: Hooks) -> list[Real] | None:
    """The passes by the student itself, in order; those after the first with its parameters moved for the time.

    A model may not work far from where it is, such as one with a matrix that has to stay positive definite. Then they
    move less, and at last not at all, which shows whether the failure is the model's own.
    """
    check_disjoint(student.trainable())
    failures: list[Exception] = []
    for size in (*_MOVES, 0.0):
        for _ in range(2):
            try:
                found = _passes_moved_by(size, student, passes, start, hooks)
            except _MovedTooFarError as error:
                failures.append(error.failure)
                put_back(start)
            else:
                if len(failures) % 2:  # it passes now, so the failure was not the move's
                    raise failures[-1]
                return found
    raise failures[-1]


class _MovedTooFarError(Exception):
    """A pass after the first failed."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure


def _passes_moved_by(
    size: float, student: FunctionalStudent, passes: list[Pass], start: Start, hooks: Hooks
) -> list[Real] | None:
    trained, found, nodes = student.trainable(), list[Real](), set[Any]()
    start.state.guard_iterators()
    with (
        _parameters_put_back(trained),
        _arrays_put_back(start.state.large_arrays) as check_arrays,
        uncompiled(student.module),
    ):
        for t, (what, batch, terms, _) in enumerate(passes):
            params = {name: p.clone() for name, p in student.detached().items()}
            values = {name: p.detach().clone() for name, p in trained.items()}
            try:
                with hooks, no_parametrization_cache(), _no_autocast_cache():
                    train = TrainPass(student.module, student, as_it_is(batch), terms, start, what=what)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                if t == 0:
                    raise
                raise _MovedTooFarError(error) from error
            if train.float16:
                return None
            check_same_parameters(trained, student.trainable())
            check_unwritten([name for name, p in trained.items() if not torch.equal(p, values[name])])
            check_arrays()
            check_apart(train.losses, nodes)
            with as_written(student.device_type):
                gradient = train.last_gradient_of(mixed(train.losses), trained)
            found.append(Real(train.losses.detach(), gradient, params, tolerance_of(train.losses)))
            _move(trained, size, seed=t)
    return found


def mixed(losses: Tensor) -> Tensor:
    """A weighted mean in which no two losses cancel, whatever their signs.

    Examples:
        >>> mixed(torch.tensor([[1.0], [1.0]]))
        tensor(1.3851)
    """
    weights = 1 + 0.5 * torch.arange(losses.numel(), device=losses.device).cos()
    return weighted_mean(weights.view_as(losses).to(losses.dtype), losses)


class Hooks(TorchFunctionMode):
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
def _parameters_put_back(params: Params) -> Iterator[None]:
    """A block that may write to parameters; puts back their values, version counters and `requires_grad`.

    Else a graph of the user's on the same parameters would count as modified.
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
    """Change each parameter by a share of itself and of its mean size, so that small entries may change their sign."""
    generator = torch.Generator().manual_seed(seed)
    for p in params.values() if size else ():
        share = size * (3 * torch.rand(p.shape, generator=generator) - 1).to(p)  # so that the norm changes, too
        p.add_(share * (p + p.abs().mean()) if bool(p.any()) else share * _MOVES[0])


@contextmanager
def _arrays_put_back(arrays: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """A block that may write to NumPy arrays, which are put back; gives what raises where one was written to."""
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
