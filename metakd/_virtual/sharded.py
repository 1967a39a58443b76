"""A student of `fully_shard` as a function of this process's parts of its parameters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metakd._autodiff import Gradients, NoSecondDerivative, Params
from metakd._basics.module_call import call
from metakd._basics.nest import map_tensors
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.kernels import differentiable_kernels, no_parametrization_cache
from metakd._virtual.shards import is_sharded, local, reduces_gradients, settle, shards_at, tangents_in
from metakd.errors import MetaKDError


def as_function(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    others: Callable[[], Sequence[Any]] = tuple,
    excluded: nn.Module | None = None,
) -> FunctionalStudent:
    """The student as a function, sharded or not; the arguments are those of `FunctionalStudent`."""
    kind = ShardedStudent if is_sharded(module) else FunctionalStudent
    return kind(module, dtype, others, excluded)


class ShardedStudent(FunctionalStudent):
    """Runs a student of `fully_shard` with other values in this process's parts of its parameters.

    All processes run their passes together. A pass writes the values into the parts in place, lets `fully_shard` gather
    each module's parameters when it runs, and puts the bits back. Nothing else is gathered. Gradients come from
    `backward`, whose hooks average them over the processes. In forward mode each module's tangents are gathered beside
    its parameters. There is no second derivative in reverse mode.
    """

    def trainable(self) -> Params:
        """The sharded parameters that require gradients, by name."""
        settle(self.module)
        return super().trainable()

    def detached(self) -> Params:
        """This process's parts of `trainable()`, without autograd history."""
        return {name: local(p) for name, p in self.trainable().items()}

    def cast(self, value: Any) -> Any:
        """A nest with this process's parts in the place of sharded tensors."""
        return map_tensors(local, value)

    def start(self) -> Start:
        """Capture the state that a pass from here starts with."""
        settle(self.module)
        return super().start()._replace(settle=lambda: settle(self.module))

    def gradients(
        self, values: Tensor, params: Params, cotangent: Tensor | None = None, *, retain_graph: bool = False
    ) -> Gradients:
        """The same in this process's parts, averaged over the processes."""
        if not values.requires_grad or not params:
            return dict.fromkeys(params)
        along = torch.ones_like(values) if cotangent is None else cotangent
        found = self._backward([values], [along], retain_graph=retain_graph)
        return {name: found[name] for name in params}

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
        """Run one forward pass; see `FunctionalStudent.run`. With a graph, `then` must return one tensor."""
        assert not others, "check_sharded refuses terms with parameters of their own"

        def forward() -> Any:
            return then(call(self.module, inputs))

        start.rng.restore()
        if torch.is_grad_enabled() and any(p.requires_grad for p in params.values()):
            ends: list[Start | None] = []
            outputs = _ShardedPass.apply(self, start, forward, wants_end, ends, list(params), *params.values())  # type: ignore[no-untyped-call]
            return outputs, ends[0]
        # Not in forward mode, where torch.no_grad() would stop tangents; there no parameter requires gradients.
        dual = any(forward_ad.unpack_dual(p).tangent is not None for p in params.values())
        with nullcontext() if dual else torch.no_grad():
            return self._inside(params, start, forward, wants_end=wants_end)

    def _swaps(self, params: Params, others: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
        return {}  # fully_shard keeps its own parameters; see `_placed`

    def _placed(self, params: Params) -> AbstractContextManager[None]:
        return shards_at(self.trainable(), {n: forward_ad.unpack_dual(p).primal.detach() for n, p in params.items()})

    @contextmanager
    def _running(self, params: Params, start: Start, others: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        moved = {name: forward_ad.unpack_dual(p).tangent for name, p in params.items()}
        tangents = {name: tangent for name, tangent in moved.items() if tangent is not None}
        try:
            with (
                tangents_in(self.module, self.trainable(), tangents),
                differentiable_kernels(self.module),
                no_parametrization_cache(),
            ):
                yield
        finally:
            settle(self.module)

    def _backward(self, outputs: list[Tensor], cotangents: list[Tensor], *, retain_graph: bool) -> Gradients:
        """Run a backward pass and return what it adds to `.grad`, which it leaves unchanged."""
        if not reduces_gradients(self.module):
            raise MetaKDError(
                "set_requires_gradient_sync(False) keeps gradients of a sharded student whole on every process, but a "
                "hypergradient needs their mean; leave it out, or pass meta_batch=None to such calls"
            )
        shards = self.trainable()
        kept = {name: p.grad for name, p in shards.items()}
        try:
            for p in shards.values():
                p.grad = None
            torch.autograd.backward(outputs, cotangents, retain_graph=retain_graph)
            settle(self.module)
            return {name: None if p.grad is None else local(p.grad) for name, p in shards.items()}
        finally:
            settle(self.module)
            for name, p in shards.items():
                p.grad = kept[name]


class _ShardedPass(torch.autograd.Function):
    """The outputs of a pass; its backward runs that of the pass's own graph, with the same values in the parts."""

    @staticmethod
    def forward(
        ctx: Any,
        student: ShardedStudent,
        start: Start,
        forward: Callable[[], Tensor],
        wants_end: bool,
        ends: list[Start | None],
        names: list[str],
        *values: Tensor,
    ) -> Tensor:
        ctx.student, ctx.start, ctx.names = student, start, names
        ctx.save_for_backward(*values)
        with torch.enable_grad():
            ctx.outputs, end = student._inside(
                dict(zip(names, values, strict=True)), start, forward, wants_end=wants_end
            )
        ends.append(end)
        outputs: Tensor = ctx.outputs
        return outputs.detach().clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NoSecondDerivative("a sharded student (fully_shard) has no second derivatives in reverse mode")
        values = dict(zip(ctx.names, ctx.saved_tensors, strict=True))

        def backward() -> Gradients:
            with torch.enable_grad():  # checkpoints run parts of the pass again
                found: Gradients = ctx.student._backward([ctx.outputs], [cotangent], retain_graph=False)
                return found

        found, _ = ctx.student._inside(values, ctx.start, backward)
        return None, None, None, None, None, None, *(found[name] for name in ctx.names)
