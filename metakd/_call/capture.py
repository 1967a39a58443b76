"""A balancer's iteration as a CUDA graph: what the capture needs, and what the graph holds as constants."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metakd._basics.positive_int import positive_int
from metakd._basics.rng import capturing
from metakd._basics.together import copy_into
from metakd._call.replay import Constants, Host, Replay
from metakd.errors import MetaKDError
from metakd.inner.groups import optimizers


def check_capture(balancer: Any) -> None:
    """Check that a call can be captured and replayed, or raise a `MetaKDError`.

    A graph repeats the kernels of one call. So nothing may be read from the device, and no call may differ from the
    next by its number.
    """
    proofs = balancer._proofs
    if not balancer.defer_checks:
        why = (
            "its checks read numbers from the device; use balancer.capture(iteration), or defer_checks=True and "
            "read_checks()"
        )
    elif (balancer.accumulate > 1 or balancer.every > 1) and not balancer._phased:
        why = "accumulate and every make calls differ, but a graph repeats one call; use balancer.capture(iteration)"
    elif balancer._ranks.several:
        why = "its ranks wait for each other; train without graphs"
    elif balancer._calls == 0 or proofs.draws is None:
        why = "its first call, which proves and warms up, must come before, with verify=True"
    elif proofs.draws:
        why = (
            "the student or a term draws random numbers (dropout), and a graph would draw others in each pass; train "
            "without graphs, or without dropout"
        )
    else:
        return
    raise MetaKDError(f"this call cannot be captured in a CUDA graph: {why}")


def captured(balancer: Any, iteration: Callable[..., Any], check_every: int) -> Replay:
    """See `BilevelLossBalancer.capture`."""
    positive_int(check_every, "check_every")
    device = next(iter(balancer._functional.trainable().values())).device

    def deferred(*items: Any) -> Any:
        if not capturing():
            if device.type == "cuda":
                make_capturable(balancer.weighting_optimizer)  # again, as a loaded state may have undone it
            try:
                balancer.read_checks()
            finally:
                balancer._late = []  # those of a graph that is not replayed any more are read once
            return iteration(*items)
        before, balancer.defer_checks, balancer._late, balancer._phased = balancer.defer_checks, True, [], True
        try:
            return iteration(*items)
        finally:
            balancer.defer_checks, balancer._phased = before, False

    return Replay(deferred, device, _Balancer(balancer, check_every))


class _Balancer(Host):
    """A balancer's own count of calls, its report and waiting checks, and the hypergradients that it accumulates."""

    def __init__(self, balancer: Any, check_every: int) -> None:
        super().__init__(lambda: constants_of(balancer))
        self.balancer, self.check_every, self.replays = balancer, check_every, 0
        self._start = balancer._step.pending

    def phase(self) -> Hashable:
        """How many hypergradients are gathered, and whether the next call takes one."""
        return self.balancer._step.pending.number, (self.balancer._calls + 1) % self.balancer.every

    def before_capture(self) -> None:
        """Keep the sum of hypergradients that the graph reads."""
        self._start = self.balancer._step.pending

    def after_capture(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Bring the sum to where the graph reads it; go on with what the graph leaves."""
        balancer, start = self.balancer, self._start
        report, checks, end = balancer._report, balancer._late, balancer._step.pending
        balancer._step.pending, balancer._calls, balancer._late = start, balancer._calls - 1, []

        def before() -> None:
            now = balancer._step.pending
            if now is not start:
                copy_into(list(start.total.values()), [now.total[name] for name in start.total])

        def after() -> None:
            balancer._report, balancer._late, balancer._step.pending = report, checks, end
            balancer._calls += 1
            self.replays += 1
            if self.replays % self.check_every == 0:
                balancer.read_checks()

        return before, after


def constants_of(balancer: Any) -> Constants:
    """What the graph of a balancer's iteration holds as constants, by name."""
    called = {**balancer.terms, "the meta loss": balancer.meta_loss}
    every = [*optimizers(balancer.optimizer), *filter(None, [balancer.weighting_optimizer])]
    teachers = balancer.teacher if isinstance(balancer.teacher, list | tuple) else [balancer.teacher]
    held = [balancer.student, balancer.weighting, *teachers, *balancer._called()]
    modules = [m for part in held if isinstance(part, nn.Module) for m in part.modules()]
    parts = [*modules, *(part for part in held if not isinstance(part, nn.Module))]
    return {
        "modules, hooks or terms": balancer._proofs.key(balancer._functional, (), called, balancer.estimator),
        "an attribute": tuple((id(part), *_attributes(part)) for part in parts),
        "the memory of parameters": tuple(_memory_of(modules)),
        "a number of an optimizer": tuple(map(numbers_of, every)),
        "the memory of an optimizer's state": tuple(map(state_of, every)),
    }


def numbers_of(optimizer: torch.optim.Optimizer) -> Hashable:
    """The settings of an optimizer's groups, such as learning rates, which its step reads as Python numbers."""
    return tuple(
        (key, tuple(map(id, value)) if key == "params" else repr(value))
        for group in optimizer.param_groups
        for key, value in group.items()
        if not isinstance(value, Tensor)
    )


def state_of(optimizer: torch.optim.Optimizer) -> Hashable:
    """Where an optimizer's state lies: loading a state replaces its tensors."""
    return tuple(t.data_ptr() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def make_capturable(optimizer: torch.optim.Optimizer | None) -> None:
    """Let an optimizer count its steps on the device, if it is one that counts: a graph cannot count otherwise."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        if group.get("capturable") is False:
            group["capturable"] = True
            for p in group["params"]:
                if isinstance(step := optimizer.state.get(p, {}).get("step"), Tensor):
                    optimizer.state[p]["step"] = step.to(p.device)


def _memory_of(modules: Iterable[nn.Module]) -> Iterator[Hashable]:
    for module in modules:
        for kind in (module._parameters, module._buffers):
            yield from ((name, t.data_ptr(), t.requires_grad) for name, t in kind.items() if t is not None)


def _attributes(part: Any) -> Iterator[Hashable]:
    for name, value in getattr(part, "__dict__", {}).items():
        if value is None or type(value) in (bool, int, float, str):
            yield name, value
        elif isinstance(value, Tensor):
            yield name, value.data_ptr()
