"""A student as a pure function of its parameters, its buffers and the random numbers it draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakd._autodiff import Params
from metakd._basics.module_call import call
from metakd._basics.nest import map_tensors
from metakd._basics.rng import RngState
from metakd._virtual.kernels import differentiable_kernels, no_parametrization_cache, recomputed_by
from metakd._virtual.precision import HALF
from metakd._virtual.python_state import PythonState
from metakd._virtual.reach import reach
from metakd.inner import as_real


class Start(NamedTuple):
    """All that one forward pass reads besides parameters and inputs: buffers, Python objects and generators."""

    state: PythonState
    rng: RngState


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and (Distributed)DataParallel wrappers.

    Virtual steps run the bare module: compiled graphs drop second-order terms, and data-parallel wrappers
    would communicate.

    Examples:
        >>> bare = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(bare)) is bare
        True
    """
    *_, bare = _layers(module)
    return bare


def data_parallel(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper that averages a student's gradients over several processes, if there is one.

    Examples:
        >>> data_parallel(nn.Linear(2, 2)) is None
        True
    """
    return next((m for m in _layers(module) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """A module with all of its wrappers, from the outermost to the bare one."""
    while True:
        yield module
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return


class FunctionalStudent:
    """Runs a module on given parameters without leaving a trace on it.

    `run(params, inputs, start, then)` is a pure function: each parameter is swapped in wherever the module, its hooks
    and the terms hold it, buffers and attributes are those of `start` and are written to copies, the generators start
    where `start` says, and only differentiable kernels are used. Calling it twice with the same arguments gives the
    same, dropout and batch statistics included. It is called inside `untouched`, which puts everything back.

    Args:
        module: the student; wrappers of `torch.compile` and data parallelism are looked through.
        dtype: run in this floating-point type in place of the module's own; by default in float32 where that is half
            precision, in which a step of the optimizer is lost in rounding.
        others: gives whatever else a pass calls: terms, meta loss, features.
        apart: modules that none of these may touch: the weight model.

    Examples:
        >>> student = FunctionalStudent(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
        >>> with student.untouched() as start:
        ...     a, _ = student.run(student.detached(), torch.ones(2, 3), start)
        ...     b, _ = student.run(student.detached(), torch.ones(2, 3), start)
        >>> torch.equal(a, b)
        True
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype | None = None,
        others: Callable[[], Sequence[Any]] = tuple,
        apart: nn.Module | None = None,
    ) -> None:
        self.module, self._others, self._apart = unwrap(module), others, apart
        half = any(p.dtype in HALF for p in self.trainable().values())
        self._dtype = torch.float32 if dtype is None and half else dtype
        self._home: PythonState | None = None

    def trainable(self) -> Params:
        """The parameters that ask for gradients, by name; tied ones once. The very tensors of the module."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def detached(self) -> Params:
        """`trainable()` cut from autograd, in the dtype of the runs; complex ones as their real view."""
        return {name: self.cast(as_real(p.detach())) for name, p in self.trainable().items()}

    def cast(self, value: Any) -> Any:
        """A nest of tensors with the floating-point and complex ones in the dtype of the runs."""
        return value if self._dtype is None else map_tensors(partial(_cast, self._dtype), value)

    @property
    def device_type(self) -> str:
        """The type of the devices that hold the student."""
        return next(self.module.parameters()).device.type

    @property
    def devices(self) -> set[torch.device]:
        """The devices that hold the student."""
        return {p.device for p in self.module.parameters()}

    def start(self) -> Start:
        """What a pass from here starts with, copied."""
        apart = [] if self._apart is None else list(self._apart.modules())
        state = PythonState(reach([self.module, *self._others()], apart))
        return Start(state, RngState.capture(self.devices))

    def run(
        self,
        params: Params,
        inputs: Any,
        start: Start,
        then: Callable[[Any], Any] = lambda outputs: outputs,
        *,
        wants_end: bool = False,
    ) -> tuple[Any, Start | None]:
        """One forward pass on `params`, and what `then` makes of its outputs while they are swapped in.

        Args:
            params: by name, as in `detached()`.
            inputs: of the module, which may write to them.
            start: where the pass starts.
            then: outputs -> result; terms that use the student's own layers find the same parameters there.
            wants_end: give the start of a pass right after this one as well.
        """
        start.rng.restore()
        return self._inside(params, start, lambda: then(call(self.module, self.cast(inputs))), wants_end=wants_end)

    def _inside(
        self, params: Params, start: Start, function: Callable[[], Any], *, wants_end: bool = False
    ) -> tuple[Any, Start | None]:
        """A function's value from `start` on while `params` are swapped in, and where it ends."""
        if self._home is None:
            raise RuntimeError("a virtual pass runs inside FunctionalStudent.untouched()")
        named, state = dict(self.module.named_parameters()), start.state
        swaps = {id(p): self._swapped_in(p, params.get(name)) for name, p in named.items()}
        swaps |= {i: self.cast(value).clone() for i, value in state.values.items()}
        try:
            state.put_back(swaps)
            recomputed = recomputed_by(lambda again: self._inside(params, start, again)[0])
            with differentiable_kernels(self.module), recomputed, no_parametrization_cache():
                value = function()
            return value, self._end(state, swaps) if wants_end else None
        finally:
            self._home.put_back()

    def _swapped_in(self, p: Tensor, new: Tensor | None) -> Tensor:
        if new is None:
            return p if self._dtype is None else self.cast(p.detach())
        swap = torch.view_as_complex(new) if p.is_complex() and not new.is_complex() else new
        vars(swap).update(vars(p))
        swap._is_param = True  # what torch itself asks for in isinstance(swap, nn.Parameter)
        return swap

    def _end(self, state: PythonState, swaps: Mapping[int, Tensor]) -> Start:
        reals = {id(t): t for *_, t in state.tensors}
        now = self.start()
        names = {id(swap): reals[i] for i, swap in swaps.items() if i in reals}
        return Start(now.state.translated(names), now.rng)

    @contextmanager
    def untouched(self) -> Iterator[Start]:
        """A block after which all is put back; gives the start of a pass from here.

        Put back are buffers, attributes, what hooks and terms left in objects of theirs, and the generators. Virtual
        passes leave all this behind; a backward pass through the real forward pass changes buffers where it recomputes
        a checkpointed BatchNorm.
        """
        start, home = self.start(), self._home
        self._home = start.state
        try:
            yield start
        finally:
            self._home = home
            put_back(start)


def put_back(start: Start) -> None:
    """Make everything what it was at `start`."""
    start.rng.restore()
    start.state.put_back()
    start.state.put_values_back()


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
