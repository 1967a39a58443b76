"""The student's own torch optimizer as a differentiable one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.transform.scale_by_adam import ScaleByAdamState

from metakd.derivatives import Params
from metakd.errors import MetaKDError
from metakd.inner.repaired import MomentumState, own, repaired

Group = dict[str, Any]

SUPPORTED = (
    "torch.optim.SGD (lr, momentum, dampening, nesterov, weight_decay, maximize), torch.optim.Adam and "
    "torch.optim.AdamW (lr, betas, eps, weight_decay, decoupled_weight_decay, maximize)"
)


class InnerOptimizer(NamedTuple):
    """A differentiable optimizer and the state it starts from.

    Attributes:
        transformation: its `init` and `update`, as TorchOpt has them.
        state: of the parameters it was built for.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> transformation, state = mirror(torch.optim.SGD([w], lr=0.5, momentum=0.9), {"w": w})
        >>> transformation.update({"w": torch.ones(2)}, state, params={"w": w})[0]
        {'w': tensor([-0.5000, -0.5000])}
    """

    transformation: GradientTransformation
    state: Any


def plain_sgd(optimizer: torch.optim.Optimizer, params: Params) -> InnerOptimizer:
    """Gradient descent at the optimizer's current learning rates, one a group; no momentum, no decay.

    This is the lookahead of BiKD and of Meta-Weight-Net: theta' = theta - lr * g.

    Args:
        optimizer: the student's own optimizer; read, never written.
        params: the student's trainable parameters, the very tensors the optimizer holds.

    Returns:
        The optimizer; its state is empty.

    Raises:
        MetaKDError: the optimizer does not hold all of `params`.

    Examples:
        >>> from metakd.inner import apply
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> inner = plain_sgd(torch.optim.Adam([w], lr=0.5), {"w": w})
        >>> apply(inner.transformation, {"w": torch.tensor([1.0])}, inner.state, {"w": w.detach()})[0]
        {'w': tensor([0.5000])}
    """
    parts = [(names, torchopt.sgd(lr=float(group["lr"]))) for names, group in _groups(optimizer, params)]
    transformation = _by_group(parts)
    return InnerOptimizer(transformation, transformation.init(params))


def mirror(optimizer: torch.optim.Optimizer, params: Params) -> InnerOptimizer:
    """The optimizer's own update rule, hyper-parameters and present state, made differentiable.

    Supported are `torch.optim.SGD`, `Adam` and `AdamW` with any number of parameter groups. K steps of the
    mirror are K steps of the optimizer, to rounding.

    Args:
        optimizer: the student's own optimizer; read, never written.
        params: the student's trainable parameters, the very tensors the optimizer holds.

    Returns:
        The optimizer, and the present state of `optimizer`, copied.

    Raises:
        MetaKDError: another optimizer, an unsupported flag, or an optimizer that does not hold all of `params`.

    Examples:
        >>> from metakd.inner import apply
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> inner = mirror(torch.optim.SGD([w], lr=0.5, weight_decay=0.2), {"w": w})
        >>> apply(inner.transformation, {"w": torch.tensor([1.0])}, inner.state, {"w": w.detach()})[0]
        {'w': tensor([0.4000])}
    """
    kind = type(_bare(optimizer))
    rule = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adamw}.get(kind)
    if rule is None:
        raise MetaKDError(
            f"inner='mirror' cannot follow {kind.__name__}; it supports {SUPPORTED}. "
            "Use inner='sgd', or pass a torchopt GradientTransformation as inner="
        )
    parts = [(names, repaired(rule(group))) for names, group in _groups(optimizer, params)]
    states = []
    for names, transformation in parts:
        cold = transformation.init({name: params[name].detach() for name in names})
        # TorchOpt's state lists follow the parameters' names in sorted order.
        own = [optimizer.state.get(params[name], {}) for name in sorted(names)]
        states.append(tuple(_warm(part, own) for part in cold))
    return InnerOptimizer(_by_group(parts), tuple(states))


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The user's own optimizer inside wrappers that keep it as `.optimizer`, as Accelerate's and Lightning's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _sgd(group: Group) -> GradientTransformation:
    flags = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    return torchopt.sgd(lr=float(group["lr"]), **{flag: group[flag] for flag in flags})


def _adamw(group: Group) -> GradientTransformation:
    # In older torch AdamW is a class of its own, whose groups do not say that their decay is decoupled.
    return _adam({"decoupled_weight_decay": True, **group})


def _adam(group: Group) -> GradientTransformation:
    if group["amsgrad"]:
        raise MetaKDError(
            f"inner='mirror' does not support amsgrad=True; it supports {SUPPORTED}. Switch amsgrad "
            "off, or use inner='sgd'"
        )
    b1, b2 = group["betas"]
    factory = torchopt.adamw if group.get("decoupled_weight_decay") else torchopt.adam
    flags = ("eps", "weight_decay", "maximize")
    return factory(lr=float(group["lr"]), betas=(float(b1), float(b2)), **{flag: group[flag] for flag in flags})


def _warm(state: Any, own: Sequence[Mapping[str, Any]]) -> Any:
    """The state of one transformation, filled from the states of torch's optimizer where it has any."""
    if isinstance(state, MomentumState):
        found = [entry.get("momentum_buffer") for entry in own]
        trace = [_or(b, z) for b, z in zip(found, state.trace, strict=True)]
        return MomentumState(trace, [b is not None for b in found])
    if isinstance(state, ScaleByAdamState):
        return ScaleByAdamState(
            [_or(entry.get("exp_avg"), z) for entry, z in zip(own, state.mu, strict=True)],
            [_or(entry.get("exp_avg_sq"), z) for entry, z in zip(own, state.nu, strict=True)],
            [_or(entry.get("step"), z) for entry, z in zip(own, state.count, strict=True)],
        )
    return state


def _or(source: Any, like: Tensor) -> Tensor:
    return like if source is None else torch.as_tensor(source).detach().to(like.device, like.dtype)


def _groups(optimizer: torch.optim.Optimizer, params: Params) -> list[tuple[list[str], Group]]:
    """The names of the parameters in each of the optimizer's groups that has any."""
    held = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, p in params.items() if id(p) not in held]
    if missing and len(missing) == len(params):
        raise MetaKDError(
            "the optimizer holds none of the student's trainable parameters, so it is the optimizer of another "
            "model (or of a copy made before it); build it as torch.optim.SGD(student.parameters(), ...)"
        )
    if missing:
        raise MetaKDError(
            f"{len(missing)} trainable parameter(s) of the student are not in the optimizer: {missing[:5]}; "
            "add them to it, or freeze them with requires_grad_(False)"
        )
    names: dict[int, list[str]] = {}
    for name, p in params.items():
        names.setdefault(held[id(p)], []).append(name)
    return [(names[i], optimizer.param_groups[i]) for i in sorted(names)]


def _by_group(parts: Sequence[tuple[list[str], GradientTransformation]]) -> GradientTransformation:
    """One transformation out of one a parameter group; its state is the tuple of theirs."""

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(part.init({name: params[name] for name in names}) for names, part in parts)

    def update(
        updates: Any, state: Any, *, params: Any = None, inplace: bool = True
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        merged, states = {}, []
        for (names, part), part_state in zip(parts, state, strict=True):
            own = {name: params[name] for name in names}
            gradients = {name: updates[name] for name in names}
            new, new_state = part.update(gradients, part_state, params=own, inplace=inplace)
            merged.update(new)
            states.append(new_state)
        return merged, tuple(states)

    return own(GradientTransformation(init, update))
