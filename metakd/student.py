"""A student as a pure function of its parameters, its buffers and the random numbers it draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakd.batch import map_tensors
from metakd.calling import call
from metakd.derivatives import Params
from metakd.kernels import differentiable_kernels, recomputed_by
from metakd.precision import HALF
from metakd.replay import Product, are_duals_of, replayed
from metakd.rng import RngState


class Start(NamedTuple):
    """All that one forward pass reads besides parameters and inputs: buffers (copies) and generators."""

    buffers: Params
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

    `run(params, inputs, start)` is a pure function: buffers are read from and written to copies, the
    generators start where `start` says, and only differentiable kernels are used. Calling it twice with
    the same arguments gives the same outputs, dropout and batch statistics included. The caller puts
    the generators back afterwards (`untouched`).

    Args:
        module: the student; wrappers of `torch.compile` and data parallelism are looked through.
        dtype: run in this floating-point type in place of the module's own; by default in float32 where that is half
            precision, in which a step of the optimizer is lost in rounding.

    Examples:
        >>> student = FunctionalStudent(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
        >>> with student.untouched() as start:
        ...     a, _ = student.run(student.detached(), torch.ones(2, 3), start)
        ...     b, _ = student.run(student.detached(), torch.ones(2, 3), start)
        >>> torch.equal(a, b)
        True
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module = unwrap(module)
        half = any(p.dtype in HALF for p in self.trainable().values())
        self._dtype = torch.float32 if dtype is None and half else dtype

    def trainable(self) -> Params:
        """The parameters that ask for gradients, by name; tied ones once. The very tensors of the module."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def detached(self) -> Params:
        """`trainable()` cut from autograd, in the dtype of the runs."""
        return {name: self.cast(p.detach()) for name, p in self.trainable().items()}

    def cast(self, value: Any) -> Any:
        """A nest of tensors with the floating-point ones in the dtype of the runs."""
        if self._dtype is None:
            return value
        return map_tensors(lambda t: t.to(self._dtype) if t.is_floating_point() else t, value)

    @property
    def device_type(self) -> str:
        """The type of the devices that hold the student."""
        return next(self.module.parameters()).device.type

    @property
    def devices(self) -> set[torch.device]:
        """The devices that hold the student."""
        return {p.device for p in self.module.parameters()}

    def start(self) -> Start:
        """Copies of the buffers as they are now, and the generators' states."""
        buffers = {name: self.cast(b.detach().clone()) for name, b in self.module.named_buffers()}
        return Start(buffers, RngState.capture(self.devices))

    def run(
        self, params: Params, inputs: Any, start: Start, tape: Sequence[Product] = ()
    ) -> tuple[Any, Callable[[], Start]]:
        """One forward pass on `params`; returns the outputs, and what gives the start of the pass right after it.

        With the tape of a recorded pass over the same inputs from the same start, dual numbers take their values from
        there if `params` are the module's own.
        """
        start.rng.restore()
        known = tape if tape and are_duals_of(params, self.trainable()) else ()
        with replayed(known):
            outputs, buffers = self._evaluate(params, start.buffers, partial(call, self.module, self.cast(inputs)))
        return outputs, lambda: Start(buffers, RngState.capture(self.devices))

    def _evaluate(self, params: Params, buffers: Params, function: Callable[[], Any]) -> tuple[Any, Params]:
        """A function's value while the module holds these parameters and copies of the buffers; also the latter."""
        frozen = {name: self.cast(p) for name, p in self.module.named_parameters() if not p.requires_grad}
        state = {**params, **frozen, **{name: b.clone() for name, b in buffers.items()}}
        inside = {f"module.{name}": value for name, value in state.items()}
        with differentiable_kernels(self.module), recomputed_by(partial(self._evaluate, params, buffers)):
            value = functional_call(_Holder(self.module), inside, (function,))
        return value, {name: _primal(inside[f"module.{name}"]) for name in buffers}

    def keep(self) -> tuple[Start, Callable[[], None]]:
        """The start of a pass from here, and a function that puts the module and the generators back to it.

        Put back are buffers and tensors kept as plain attributes; parameters are never written to.
        """
        copies = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        start = Start({name: self.cast(b) for name, b in copies.items()}, RngState.capture(self.devices))
        places = [(m, name, b) for m in self.module.modules() for name, b in m._buffers.items() if b is not None]
        values = {id(b): copies[name] for name, b in self.module.named_buffers()}
        attributes = [(vars(module), dict(vars(module))) for module in self.module.modules()]

        def put_back() -> None:
            start.rng.restore()
            for module, name, buffer in places:
                buffer.data.copy_(values[id(buffer)])  # by .data, for a graph that waits for its backward may hold it
                module._buffers[name] = buffer
            for now, old in attributes:
                put_back_tensors(now, old)

        return start, put_back

    @contextmanager
    def untouched(self) -> Iterator[Start]:
        """A block after which all is put back (`keep`); gives the start of a pass from here.

        Virtual passes draw random numbers, and leave attributes behind where hooks store what they compute; a backward
        pass through the real forward pass changes buffers where it recomputes a checkpointed BatchNorm.
        """
        start, put_back = self.keep()
        try:
            yield start
        finally:
            put_back()


class _Holder(nn.Module):
    """Calls functions that use a module: what `functional_call` needs to swap the module's tensors meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def put_back_tensors(now: dict[str, Any], old: dict[str, Any]) -> None:
    """The tensors among a module's attributes `now` as they were in `old`."""
    for name in now.keys() | old.keys():
        if now.get(name) is not old.get(name) and any(isinstance(d.get(name), Tensor) for d in (now, old)):
            if name in old:
                now[name] = old[name]
            else:
                del now[name]


def _primal(buffer: Tensor) -> Tensor:
    """A buffer as the next pass reads it: a constant, without tangent or graph."""
    primal: Tensor = torch.autograd.forward_ad.unpack_dual(buffer).primal
    return primal.detach()
