"""Hooks that store, change and count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.proof.students.registry import Loose, Parts, Stage, linear, part, size


@part()
def hook_stores_in_dict(parts: Parts) -> None:
    store: dict[str, Tensor] = {}
    parts.add(Stage(lambda self, z: torch.tanh(self.layer(z))))
    parts.last.register_forward_hook(lambda module, inputs, output: store.update(z=output))
    parts.terms["hook_dict"] = lambda outputs, batch: size(store["z"])
    parts.watched.append(lambda: store)


@part()
def hook_stores_in_list(parts: Parts) -> None:
    store: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        store[:] = [output]

    parts.student.first.register_forward_hook(keep)
    parts.terms["hook_list"] = lambda outputs, batch: size(store[-1])
    parts.watched.append(lambda: store)


class Keeper:
    def __init__(self) -> None:
        self.value: Any = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.value = output


class SlotKeeper:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.value = output


@part()
def hook_stores_in_object(parts: Parts) -> None:
    keeper = Keeper()
    parts.student.first.register_forward_hook(keeper)
    parts.terms["hook_object"] = lambda outputs, batch: size(keeper.value)
    parts.watched.append(lambda: keeper.value)


@part()
def hook_stores_in_slots(parts: Parts) -> None:
    keeper = SlotKeeper()
    parts.student.first.register_forward_hook(keeper)
    parts.terms["hook_slots"] = lambda outputs, batch: size(keeper.value)
    parts.watched.append(lambda: keeper.value)


@part()
def hook_stores_by_closure(parts: Parts) -> None:
    kept = None

    def keep(module: nn.Module, inputs: Any) -> None:
        nonlocal kept
        kept = inputs[0]

    parts.student.head.register_forward_pre_hook(keep)
    parts.terms["hook_closure"] = lambda outputs, batch: size(kept)  # type: ignore[arg-type]
    parts.watched.append(lambda: kept)


@part()
def global_module_hook(parts: Parts) -> None:
    """Stores by a hook of all modules; it is taken away by the next part of that kind."""
    global _GLOBAL_HOOK
    if _GLOBAL_HOOK is not None:
        _GLOBAL_HOOK.remove()
    store: dict[str, Any] = {"calls": 0}
    head = parts.student.head

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if module is head:
            store.update(z=inputs[0], calls=store["calls"] + 1)

    _GLOBAL_HOOK = nn.modules.module.register_module_forward_hook(keep)
    parts.watched.append(lambda: store)


_GLOBAL_HOOK: Any = None


@part()
def hook_changes_output(parts: Parts) -> None:
    parts.student.first.register_forward_hook(lambda module, inputs, output: output + 0.1 * output.sin())


@part()
def pre_hook_changes_input(parts: Parts) -> None:
    parts.student.head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.3,))


@part()
def hook_registered_in_the_pass(parts: Parts) -> None:
    class Lazily(Loose):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.ready, self.count = linear(), False, 0

        def counted(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.count += 1

        def forward(self, z: Tensor) -> Tensor:
            if not self.ready:
                self.layer.register_forward_hook(self.counted)
                self.ready = True
            return torch.tanh(self.layer(z))

    parts.add(Lazily())


@part()
def one_shot_hook(parts: Parts) -> None:
    """Takes itself away, as those that measure sizes do."""
    layer = linear()

    def once(module: nn.Module, inputs: Any, output: Tensor) -> None:
        handle.remove()

    handle = layer.register_forward_hook(once)
    parts.add(nn.Sequential(layer, nn.Tanh()))


@part(by_autograd=True)
def tensor_hook_scales(parts: Parts) -> None:
    def scaled(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z))
        if z.requires_grad:
            z.register_hook(lambda g: -0.5 * g)
        return z

    parts.add(Stage(scaled))


@part(by_autograd=True)
def backward_hook_scales(parts: Parts) -> None:
    parts.add(nn.Sequential(linear(), nn.Tanh()))
    parts.last[0].register_full_backward_hook(lambda module, gi, go: tuple(0.5 * g for g in gi))


@part()
def backward_hook_stores(parts: Parts) -> None:
    store: list[Any] = []
    parts.add(nn.Sequential(linear(), nn.Tanh()))
    parts.last[0].register_full_backward_hook(lambda m, gi, go: store.append(go[0].detach().clone()))
    parts.watched.append(lambda: store)


@part()
def tensor_hook_stores(parts: Parts) -> None:
    """As Grad-CAM does."""

    def watched(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z))
        if z.requires_grad:
            z.register_hook(lambda g: self.gradients.append(g.detach().clone()))
        return z

    parts.add(Stage(watched, gradients=[]))


@part()
def retains_gradient(parts: Parts) -> None:
    def kept(self: Any, z: Tensor) -> Any:
        self.features = torch.tanh(self.layer(z))
        if self.features.requires_grad:
            self.features.retain_grad()
        return self.features

    parts.add(Stage(kept))
    made = parts.last
    parts.watched.append(lambda: getattr(made.features, "grad", None) if hasattr(made, "features") else None)
