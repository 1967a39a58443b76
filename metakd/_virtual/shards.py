"""Students of `torch.distributed.fsdp.fully_shard` (FSDP2): each process holds a part of every parameter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metakd._autodiff import Params


def is_a(value: object, name: str) -> bool:
    """Whether an object's class, or one of its bases, has this name; torch imports some classes only on demand."""
    return any(cls.__name__ == name for cls in type(value).__mro__)


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [part for part in module.modules() if is_a(part, "FSDPModule")]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module or a part of it."""
    return bool(fsdp_modules(module))


def local(tensor: Any) -> Any:
    """This process's part of a sharded tensor, sharing its memory; other tensors unchanged."""
    return tensor.detach()._local_tensor if is_a(tensor, "DTensor") else tensor


def settle(module: nn.Module) -> None:
    """Give every parameter back its sharded form, after a failed pass, too."""
    for part in fsdp_modules(module):
        state = part._get_fsdp_state()
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        for group in _groups(part):
            if group._all_gather_result is not None:  # an error came between a prefetch and its use
                group.wait_for_unshard()
            group._training_state = type(group._training_state).IDLE
        part.reshard()


def reduces_gradients(module: nn.Module) -> bool:
    """Whether backward passes reduce gradients: not after `set_requires_gradient_sync(False)`."""
    return all(group.reduce_grads for part in fsdp_modules(module) for group in _groups(part))


def computing_dtypes(module: nn.Module) -> set[torch.dtype]:
    """The dtypes that mixed-precision policies compute in."""
    policies = [group.mp_policy for part in fsdp_modules(module) for group in _groups(part)]
    return {policy.param_dtype for policy in policies if policy.param_dtype is not None}


def _groups(part: Any) -> list[Any]:
    state = part._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # a list in newer versions of torch
    found = [getattr(state, "_fsdp_param_group", None)] if found is None else found
    return [group for group in found if group is not None]


@contextmanager
def shards_at(shards: Mapping[str, Tensor], values: Params) -> Iterator[None]:
    """A block with other values in a process's own parts of parameters; their bits are put back at its end."""
    kept = {name: local(p).clone() for name, p in shards.items() if name in values}
    try:
        for name in kept:
            local(shards[name]).data.copy_(values[name])  # .data: no graph of the user's saved a part
        yield
    finally:
        for name, value in kept.items():
            local(shards[name]).data.copy_(value)


@contextmanager
def tangents_in(module: nn.Module, shards: Mapping[str, Tensor], tangents: Params) -> Iterator[None]:
    """A block in which whole parameters are dual numbers while `fully_shard` has them gathered.

    Each module's tangents are gathered with its parameters, just before it runs, and dropped after it.
    """
    names = {id(p): name for name, p in shards.items()}
    handles = []
    try:
        for part in fsdp_modules(module) if tangents else ():
            own = [
                (owner, key, names[id(p)])
                for owner in _own_modules(part)
                for key, p in owner._parameters.items()
                if p is not None and id(p) in names
            ]
            whole = _Whole(own, shards, tangents)
            handles.append(part.register_forward_pre_hook(lambda *_, whole=whole: whole.enter()))
            handles.append(part.register_forward_hook(lambda *_, whole=whole: whole.leave(), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Whole:
    """The gathered parameters of one module as dual numbers, while it runs."""

    def __init__(self, own: list[tuple[nn.Module, str, str]], shards: Mapping[str, Tensor], tangents: Params) -> None:
        self._own, self._shards, self._tangents = own, shards, tangents
        self._plain: list[Any] = []

    def enter(self) -> None:
        self._plain = [owner._parameters[key] for owner, key, _ in self._own]
        made: dict[str, Any] = {}
        for (owner, key, name), p in zip(self._own, self._plain, strict=True):
            if name not in made:
                made[name] = p.detach()
                if name in self._tangents:
                    made[name] = forward_ad.make_dual(made[name], self._gathered(name).to(p))
                made[name]._is_param = True  # what torch itself asks for in isinstance(p, nn.Parameter)
            owner._parameters[key] = made[name]

    def leave(self) -> None:
        for (owner, key, _), p in zip(self._own, self._plain, strict=True):
            owner._parameters[key] = p
        self._plain = []

    def _gathered(self, name: str) -> Tensor:
        like: Any = self._shards[name]
        part = type(like).from_local(
            self._tangents[name],
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        whole: Tensor = part.full_tensor()
        return whole


def _own_modules(part: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, without those that `fully_shard` was called on separately."""
    yield part
    for child in part.children():
        if not is_a(child, "FSDPModule"):
            yield from _own_modules(child)
