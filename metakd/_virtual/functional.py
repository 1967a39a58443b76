"""A student as a pure function of its parameters, buffers, Python state and random numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakd._autodiff import Gradients, Params, gradients
from metakd._basics.module_call import call
from metakd._basics.nest import map_tensors
from metakd._basics.rng import RngState
from metakd._basics.together import clones
from metakd._virtual.kernels import differentiable_kernels, no_parametrization_cache, recomputed_by
from metakd._virtual.precision import HALF
from metakd._virtual.python_state import PythonState
from metakd._virtual.reach import Walk
from metakd.inner import as_real


class Start(NamedTuple):
    """Everything that a forward pass reads besides parameters and inputs: buffers, Python objects and generators."""

    state: PythonState
    rng: RngState
    named: dict[str, nn.Parameter]
    """The module's own parameters by name."""
    settle: Callable[[], None] = lambda: None
    """Ends what a pass that failed has left open, before the state is put back."""


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and (Distributed)DataParallel wrappers.

    Virtual passes run this bare module: compiled graphs drop second-order terms, data-parallel wrappers communicate.
    """
    *_, bare = _layers(module)
    return bare


def data_parallel(module: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper that averages the student's gradients over processes, or None."""
    return next((m for m in _layers(module) if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its wrapped modules, from the outermost wrapper to the bare module."""
    while True:
        yield module
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return


class FunctionalStudent:
    """Runs a module on given parameters and leaves it unchanged.

    `run(params, inputs, start, then)` is a pure function. It swaps each parameter wherever the module, its hooks or the
    terms hold it, writes to copies of buffers and attributes, sets the generators to `start`, and uses differentiable
    kernels. The same arguments give the same result, dropout and batch statistics included. It needs an open
    `untouched` block, which restores everything.

    Args:
        module: the student, possibly wrapped by `torch.compile` or data parallelism.
        dtype: floating-point type of the runs; by default the module's own, but float32 for half precision, where
            rounding would swallow an optimizer step.
        others: returns what else a pass calls: terms, meta loss, features.
        excluded: a module that passes must not touch: the weight model.

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
        excluded: nn.Module | None = None,
    ) -> None:
        self.module, self._others, self._excluded, self._walk = unwrap(module), others, excluded, Walk()
        self._known: Start | None = None
        half = any(p.dtype in HALF for p in self.trainable().values())
        self._dtype = torch.float32 if dtype is None and half else dtype
        self._real_state: PythonState | None = None

    def named(self) -> dict[str, nn.Parameter]:
        """The module's own parameters by name; in a block `since` a start, or `untouched`, those of its start."""
        return dict(self.module.named_parameters()) if self._known is None else self._known.named

    def trainable(self) -> Params:
        """The module's own parameters that require gradients, by name; tied ones once."""
        return {name: p for name, p in self.named().items() if p.requires_grad}

    def detached(self) -> Params:
        """`trainable()` without autograd history, in the dtype of the runs; complex ones as real views."""
        return {name: self.cast(as_real(p.detach())) for name, p in self.trainable().items()}

    def cast(self, value: Any) -> Any:
        """A nest with its floating-point and complex tensors in the dtype of the runs."""
        return value if self._dtype is None else map_tensors(partial(_cast, self._dtype), value)

    def gradients(
        self, values: Tensor, params: Params, cotangent: Tensor | None = None, *, retain_graph: bool = False
    ) -> Gradients:
        """Gradients of a real pass's scalar, or values times a cotangent, in parameters; `.grad` stays."""
        return gradients(values, params, grad_outputs=cotangent, retain_graph=retain_graph)

    @property
    def device_type(self) -> str:
        """The type of the student's device."""
        known = self._known
        first = next(self.module.parameters()) if known is None else next(iter(known.named.values()))
        return first.device.type

    @property
    def devices(self) -> set[torch.device]:
        """The student's devices."""
        return {p.device for p in self.named().values()}

    def start(self) -> Start:
        """Capture the state that a pass from here starts with."""
        excluded = [] if self._excluded is None else self._excluded.modules()
        known = self._known
        if known is not None and not known.state.unchanged():
            known = None
        unchanged = None if known is None else known.state.places
        places = self._walk.places([self.module, *self._others()], excluded, unchanged)
        named = dict(self.module.named_parameters()) if known is None else known.named
        state = PythonState(places) if known is None or places is not unchanged else known.state.now()
        return Start(state, RngState.capture({p.device for p in named.values()}), named)

    @contextmanager
    def since(self, start: Start) -> Iterator[None]:
        """A block after `start` in which the parameters stay the same, and only what has changed is captured anew."""
        home, self._known = self._known, start
        try:
            yield
        finally:
            self._known = home

    def run(
        self,
        params: Params,
        inputs: Any,
        start: Start,
        then: Callable[[Any], Any] = lambda outputs: outputs,
        *,
        wants_end: bool = False,
        others: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Any, Start | None]:
        """Run one forward pass on `params`; return what `then` makes of its outputs, and the end state if `wants_end`.

        `then` runs while the parameters are swapped in, as terms may use the student's own layers. `others` are pairs
        of a parameter that is not the module's own, such as a term's, and what replaces it.
        """
        start.rng.restore()
        return self._inside(
            params,
            start,
            lambda: then(call(self.module, self.cast(inputs))),
            wants_end=wants_end,
            others=others,
        )

    def _inside(
        self,
        params: Params,
        start: Start,
        function: Callable[[], Any],
        *,
        wants_end: bool = False,
        others: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Any, Start | None]:
        """Call a function from `start` on with `params` swapped in; return its value, and the end state if asked."""
        if self._real_state is None:
            raise RuntimeError("a virtual pass runs inside FunctionalStudent.untouched()")
        state, swaps = start.state, self._swaps(params, others)
        values = clones([self.cast(value) for value in state.values.values()])
        swaps |= dict(zip(state.values, values, strict=True))
        try:
            state.put_back(swaps)
            with self._placed(params):
                with self._running(params, start, others):
                    value = function()
                return value, self._end(state, swaps) if wants_end else None
        finally:
            self._real_state.put_back()

    def _swaps(self, params: Params, others: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
        """What takes the parameters' places, by their ids."""
        swaps = {id(p): self._swapped_in(p, params.get(name)) for name, p in self.named().items()}
        return swaps | {id(p): self._swapped_in(p, new) for p, new in others}

    def _placed(self, params: Params) -> AbstractContextManager[None]:
        """A block with values that a swap cannot place."""
        return nullcontext()

    @contextmanager
    def _running(self, params: Params, start: Start, others: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """A block for the pass itself: its kernels, and how checkpoints are recomputed."""
        recomputed = recomputed_by(lambda again: self._inside(params, start, again, others=others)[0])
        with differentiable_kernels(self.module), recomputed, no_parametrization_cache():
            yield

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
        return Start(now.state.translated(names), now.rng, self.named())

    @contextmanager
    def untouched(self) -> Iterator[Start]:
        """A block that ends by restoring everything a pass may change; gives the start of a pass from here.

        Virtual passes change buffers, attributes, objects of hooks and terms, and generators. A backward pass through
        the real forward pass does so, too, if it recomputes a checkpointed BatchNorm.
        """
        start, home = self.start(), (self._real_state, self._known)
        self._real_state, self._known = start.state, start
        try:
            yield start
        finally:
            self._real_state, self._known = home
            put_back(start)


def put_back(start: Start) -> None:
    """Restore everything to its state at `start`."""
    start.settle()
    start.rng.restore()
    start.state.put_back()
    start.state.put_values_back()


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
