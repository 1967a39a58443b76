"""Parts of random students: each adds a stage, hooks, terms or side effects to a small network."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES, FEATURES = 6, 3, 4


class Loose(nn.Module):
    """A module whose attributes may be anything."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Student(Loose):
    """A layer, stages that keep the width, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.stages = nn.ModuleList()
        self.wrap: Any = None

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.first(x))
        for stage in self.stages:
            z = stage(z)
        outputs = self.head(z)
        return outputs if self.wrap is None else self.wrap(outputs)


class Reader:
    """Finds the logits among a student's outputs; all that terms hold of the parts."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Tensor] = lambda outputs: outputs

    def __call__(self, outputs: Any) -> Tensor:
        return self.function(outputs)


@dataclass
class Parts:
    """What the ingredients of a recipe add to.

    Attributes:
        student: the network.
        terms: of the inner loss, beside a cross-entropy.
        meta_terms: added to the meta loss.
        logits: the logits among the student's outputs.
        watched: what a pass leaves outside of the student's modules.
        around: contexts that calls happen in.
        after_step: what the user's loop does after each step of the optimizer.
    """

    student: Student = field(default_factory=Student)
    terms: dict[str, Any] = field(default_factory=dict)
    meta_terms: list[Any] = field(default_factory=list)
    logits: Reader = field(default_factory=Reader)
    watched: list[Callable[[], Any]] = field(default_factory=list)
    around: list[Callable[[], Any]] = field(default_factory=list)
    after_step: list[Callable[[], Any]] = field(default_factory=list)

    def add(self, stage: nn.Module) -> None:
        self.student.stages.append(stage)

    @property
    def last(self) -> Any:
        return self.student.stages[-1]


@dataclass(frozen=True)
class Ingredient:
    """A part and what the reference has to know of it.

    Attributes:
        add: puts it into the parts.
        by_autograd: gradients are not the derivatives of the losses (hooks, detached parts): the reference is a double
            backward.
        carries: a pass reads what the one before it computed, a constant to autograd alone.
        slow: is drawn rarely.
    """

    add: Callable[[Parts], None]
    by_autograd: bool = False
    carries: bool = False
    slow: bool = False


INGREDIENTS: dict[str, Ingredient] = {}


def part(**options: Any) -> Callable[[Callable[[Parts], None]], Callable[[Parts], None]]:
    def register(add: Callable[[Parts], None]) -> Callable[[Parts], None]:
        INGREDIENTS[add.__name__] = Ingredient(add, **options)
        return add

    return register


class Stage(Loose):
    """A layer whose features another function makes."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.function = function
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, z: Tensor) -> Any:
        return self.function(self, z)


def stage(**options: Any) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    """A part that is one stage, by its function; options that are functions make members anew."""
    known = {name: options.pop(name) for name in ("by_autograd", "carries", "slow") if name in options}

    def register(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        def add(parts: Parts) -> None:
            parts.add(Stage(function, **{name: make() for name, make in options.items()}))

        INGREDIENTS[function.__name__] = Ingredient(add, **known)
        return function

    return register


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def size(z: Tensor) -> Tensor:
    return z.square().mean(1)


# Parameters in several places.


@part()
def alias(parts: Parts) -> None:
    parts.student.again = parts.student.first
    parts.add(Stage(lambda self, z: z + torch.tanh(self.layer(z))))
    parts.student.body = nn.Sequential(parts.last, nn.Tanh())


@part()
def repeated_layer(parts: Parts) -> None:
    layer = nn.Sequential(linear(), nn.Tanh())
    parts.add(layer)
    parts.add(layer)


@part(by_autograd=True)
def shared_batch_norm(parts: Parts) -> None:
    norm = nn.BatchNorm1d(WIDTH)
    parts.add(nn.Sequential(linear(), norm, nn.Tanh(), linear(), norm))


@part()
def tied(parts: Parts) -> None:
    one, other = linear(), linear()
    other.weight = one.weight
    parts.add(nn.Sequential(one, nn.Tanh(), other))


@stage(kept=list)
def kept_in_a_list(self: Any, z: Tensor) -> Any:
    if not self.kept:
        self.kept.append(self.layer.weight)
    return torch.tanh(self.layer(z)) * (1 + 0.1 * self.kept[0].square().sum())


@part()
def kept_in_a_dict(parts: Parts) -> None:
    kept: dict[str, Any] = {"w": parts.student.first.weight, "more": [parts.student.head.bias]}
    parts.add(Stage(lambda self, z: self.layer(z) * (1 + 0.1 * kept["w"].square().sum() + kept["more"][0].sum())))


@part()
def kept_in_a_tuple(parts: Parts) -> None:
    kept = (parts.student.first.weight,)
    parts.add(Stage(lambda self, z: self.layer(z) * (1 + 0.1 * kept[0].square().sum())))


@part(by_autograd=True)
def shares_storage_detached(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: torch.tanh(self.layer(z) + z @ self.shadow)))
    parts.last.shadow = parts.last.layer.weight.detach()


@part()
def shares_storage_view(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: torch.tanh(self.layer(z) + z @ self.view)))
    parts.last.view = parts.last.layer.weight.t()


@part()
def flat_parameter(parts: Parts) -> None:
    made = Stage(lambda self, z: torch.tanh(z @ self.flat[:36].view(6, 6) + self.flat[36:]))
    made.flat = nn.Parameter(0.4 * torch.randn(42))
    parts.add(made)


@part()
def attribute_of_a_parameter(parts: Parts) -> None:
    def scaled(self: Any, z: Tensor) -> Any:
        return torch.tanh(self.layer(z) * self.layer.weight.factor)

    parts.add(Stage(scaled))
    parts.last.layer.weight.factor = 0.7


# Hooks.


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


# Parametrisations and caches.


@part()
def weight_norm(parts: Parts) -> None:
    parts.add(nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh()))


@part(by_autograd=True)
def spectral_norm_eval(parts: Parts) -> None:
    layer = parametrizations.spectral_norm(linear())
    parts.add(nn.Sequential(layer.eval(), nn.Tanh()))


@part()
def orthogonal(parts: Parts) -> None:
    parts.add(nn.Sequential(parametrizations.orthogonal(linear(), orthogonal_map="householder"), nn.Tanh()))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


@part()
def own_parametrization_cached(parts: Parts) -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parts.add(nn.Sequential(layer, nn.Tanh(), layer))
    parts.around.append(parametrize.cached)


def recomputed(self: Any, z: Tensor) -> Any:
    if self.cache.get("version") != self.layer.weight._version:
        self.cache.update(version=self.layer.weight._version, matrix=torch.tanh(self.layer.weight))
    return torch.tanh(self.layer(z) + z @ self.cache["matrix"])


@part()
def cache_by_version(parts: Parts) -> None:
    parts.add(Stage(recomputed, cache={}))


@part()
def cache_by_version_zero(parts: Parts) -> None:
    made = Stage(recomputed, cache={})
    made.layer.weight = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH))
    parts.add(made)


@part()
def cache_by_identity(parts: Parts) -> None:
    def known(self: Any, z: Tensor) -> Any:
        w = self.layer.weight
        if self.cache.get("of") != [hash((w.data_ptr(), w._version))]:
            self.cache.update(of=[hash((w.data_ptr(), w._version))], matrix=torch.tanh(w))
        return torch.tanh(self.layer(z) + z @ self.cache["matrix"])

    parts.add(Stage(known, cache={}))


@part()
def cache_cleared_by_step(parts: Parts) -> None:
    """The owner of the loop throws it away after each step."""

    def known(self: Any, z: Tensor) -> Any:
        if "matrix" not in self.cache:
            self.cache["matrix"] = torch.tanh(self.layer.weight)
        return torch.tanh(self.layer(z) + z @ self.cache["matrix"])

    made = Stage(known, cache={})
    parts.add(made)
    parts.after_step.append(made.cache.clear)


@stage(norms=dict)
def norm_left_in_a_dict(self: Any, z: Tensor) -> Any:
    """Reads what an earlier layer of this pass left."""
    self.norms.setdefault("all", []).append(z)
    return torch.tanh(self.layer(z)) * (1 + 0.1 * self.norms.pop("all")[0].norm(dim=1, keepdim=True))


# Counters and generators.


@stage(count=int)
def counter_attribute(self: Any, z: Tensor) -> Any:
    self.count += 1
    return torch.tanh(self.layer(z) * (1 + 0.3 * (self.count % 3)))


@part()
def counter_class_variable(parts: Parts) -> None:
    class Counts(Stage):
        calls = 0

        def forward(self, z: Tensor) -> Tensor:
            type(self).calls += 1
            return torch.tanh(self.layer(z)) * (1 + 0.2 * (type(self).calls % 2))

    parts.add(Counts(lambda self, z: z))
    parts.watched.append(lambda: Counts.calls)


@part()
def counter_nonlocal(parts: Parts) -> None:
    calls = 0

    def counted(self: Any, z: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return torch.tanh(self.layer(z)) + 0.1 * (calls % 2)

    parts.add(Stage(counted))
    parts.watched.append(lambda: calls)


_CALLS = 0


@part()
def counter_global(parts: Parts) -> None:
    def counted(self: Any, z: Tensor) -> Any:
        global _CALLS
        _CALLS += 1
        return torch.tanh(self.layer(z)) + 0.1 * (_CALLS % 2)

    global _CALLS
    _CALLS = 0
    parts.add(Stage(counted))
    parts.watched.append(lambda: _CALLS)


@part()
def counter_of_itertools(parts: Parts) -> None:
    parts.add(Stage(lambda self, z: self.layer(z) if next(self.numbers) >= 0 else z, numbers=itertools.count()))
    made = parts.last
    parts.watched.append(lambda: repr(made.numbers))


class Property(Stage):
    calls = 0

    @property
    def scale(self) -> float:
        type(self).calls += 1
        return 1 + 0.2 * (type(self).calls % 2)

    def forward(self, z: Tensor) -> Any:
        return torch.tanh(self.layer(z)) * self.scale


@part()
def counter_in_a_property(parts: Parts) -> None:
    Property.calls = 0
    parts.add(Property(lambda self, z: z))
    parts.watched.append(lambda: Property.calls)


@part()
def bound_builtin_method(parts: Parts) -> None:
    log: list[Any] = []
    parts.add(Stage(lambda self, z: (self.note(len(z)), torch.tanh(self.layer(z)))[1], note=log.append))
    parts.watched.append(lambda: log)


@stage(history=lambda: list(range(12_000)))
def long_history(self: Any, z: Tensor) -> Any:
    self.history.append(len(z))
    return torch.tanh(self.layer(z))


@stage(array=lambda: np.zeros(70_000))
def large_array(self: Any, z: Tensor) -> Any:
    self.array[0] += 1
    return torch.tanh(self.layer(z))


@stage(state=lambda: (torch.zeros(1), torch.zeros(1)))
def tensors_in_a_tuple(self: Any, z: Tensor) -> Any:
    self.state[0].add_(1.0)
    return torch.tanh(self.layer(z))


@stage(meter=lambda: collections.UserDict(count=0))
def foreign_object(self: Any, z: Tensor) -> Any:
    self.meter["count"] += 1
    return torch.tanh(self.layer(z))


@stage(seen=lambda: collections.deque(maxlen=3), names=set)
def deque_and_set(self: Any, z: Tensor) -> Any:
    self.seen.append(len(self.seen))
    self.names.add(len(self.names))
    return torch.tanh(self.layer(z)) + 0.05 * len(self.names)


def noise(z: Tensor, numbers: Any) -> Tensor:
    return torch.as_tensor(numbers).to(z)


@stage(source=lambda: torch.Generator().manual_seed(3))
def generator_of_torch(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * torch.rand(z.shape, generator=self.source).to(z))


@stage(source=lambda: np.random.default_rng(3))
def generator_of_numpy(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * noise(z, self.source.random(z.shape)))


@stage(source=lambda: random.Random(3))
def generator_of_python(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * self.source.uniform(0.5, 1.5)


@stage()
def default_generators(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * random.uniform(0.5, 1.5) + noise(z, np.random.rand(*z.shape))


# Tensors that are written to.


@part()
def input_changed(parts: Parts) -> None:
    def change(module: nn.Module, inputs: Any) -> None:
        inputs[0].mul_(0.5).add_(0.1)

    parts.student.register_forward_pre_hook(change)


class Buffered(Stage):
    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__(function, **members)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(0), persistent=False)


def buffer(**options: Any) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    def register(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        INGREDIENTS[function.__name__] = Ingredient(lambda parts: parts.add(Buffered(function)), **options)
        return function

    return register


@buffer(carries=True, by_autograd=True)
def buffer_written(self: Any, z: Tensor) -> Any:
    self.mean.mul_(0.5).add_(0.5 * z.detach().mean(0))
    return torch.tanh(self.layer(z - self.mean))


@buffer(carries=True, by_autograd=True)
def buffer_replaced(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z - self.mean))
    self.mean = 0.5 * self.mean + 0.5 * z.detach().mean(0)
    return z


@buffer()
def buffer_resized(self: Any, z: Tensor) -> Any:
    self.seen.resize_(len(self.seen) + 1).fill_(0.1)
    return torch.tanh(self.layer(z)) + self.seen.sum()


@buffer(carries=True, by_autograd=True)
def buffer_keeps_the_graph(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z - self.mean.detach()))
    self.mean = z.mean(0)
    return z


@part()
def buffer_is_a_view(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z) + self.front.sum())
        self.whole.add_(0.1)
        return z

    made = Buffered(shifted)
    made.register_buffer("whole", torch.zeros(4))
    made.register_buffer("front", made.whole[:2])
    parts.add(made)


@part(carries=True, by_autograd=True)
def plain_tensor_written(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        if not hasattr(self, "average"):
            self.average = z.new_zeros(WIDTH)
        self.average.mul_(0.5).add_(0.5 * z.detach().mean(0))
        return torch.tanh(self.layer(z - self.average))

    parts.add(Stage(shifted))


@part()
def array_shares_memory(parts: Parts) -> None:
    def shifted(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z)) + self.seen.to(z).sum()
        self.array += 0.1
        return z

    array = np.zeros(2)
    parts.add(Stage(shifted, array=array, seen=torch.from_numpy(array)))


@part(carries=True, by_autograd=True)
def hidden_state_in_a_tuple(parts: Parts) -> None:
    def carried(self: Any, z: Tensor) -> Any:
        if self.hidden is not None:
            z = z + self.hidden[0]
        z = torch.tanh(self.layer(z))
        self.hidden = (z.detach().mean(0), z.detach())
        return z

    parts.add(Stage(carried, hidden=None))


@part(by_autograd=True, carries=True)
def parameter_clamped_in_the_pass(parts: Parts) -> None:
    def clamped(self: Any, z: Tensor) -> Any:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.3, 0.3)
        return torch.tanh(self.layer(z))

    parts.add(Stage(clamped))


@part(by_autograd=True, carries=True)
def parameter_decayed_in_the_pass(parts: Parts) -> None:
    def decayed(self: Any, z: Tensor) -> Any:
        self.layer.weight.data.mul_(0.9)
        return torch.tanh(self.layer(z))

    parts.add(Stage(decayed))


@part(by_autograd=True, carries=True)
def mean_teacher_inside(parts: Parts) -> None:
    def pulled(self: Any, z: Tensor) -> Any:
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.layer.parameters(), strict=True):
                slow.mul_(0.7).add_(0.3 * fast)
        self.distance = (self.layer(z) - self.ema(z)).square().mean(1)
        return torch.tanh(self.layer(z))

    made = Stage(pulled)
    made.ema = copy.deepcopy(made.layer).requires_grad_(False)
    parts.add(made)
    parts.terms["consistency"] = lambda outputs, batch: made.distance


# Terms.


@part()
def auxiliary_loss(parts: Parts) -> None:
    def left(self: Any, z: Tensor) -> Any:
        z = torch.tanh(self.layer(z))
        self.aux = size(z)
        return z

    parts.add(Stage(left))
    made = parts.last
    parts.terms["aux"] = lambda outputs, batch: made.aux


@part()
def term_calls_own_layer(parts: Parts) -> None:
    student = parts.student
    student.second = nn.Linear(CLASSES, CLASSES)
    logits = parts.logits

    def term(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(student.second(logits(outputs)), batch.targets, reduction="none")

    parts.terms["own_layer"] = term
    parts.meta_terms.append(term)


class NormTerm(Loose):
    def __init__(self, logits: Reader) -> None:
        super().__init__()
        self.norm, self.logits = nn.BatchNorm1d(CLASSES, affine=False), logits

    def forward(self, outputs: Any, batch: Any) -> Tensor:
        z: Tensor = self.norm(self.logits(outputs))
        return (z**3).mean(1).cos()


@part(by_autograd=True)
def term_with_batch_norm(parts: Parts) -> None:
    term = NormTerm(parts.logits)
    parts.terms["norm"] = term
    parts.watched.append(lambda: list(term.norm.buffers()))


@part(by_autograd=True)
def meta_loss_with_batch_norm(parts: Parts) -> None:
    term = NormTerm(parts.logits)
    parts.meta_terms.append(term)
    parts.watched.append(lambda: list(term.norm.buffers()))


@part()
def meta_loss_reads_a_tuple(parts: Parts) -> None:
    kept = tuple(parts.student.parameters())
    parts.meta_terms.append(lambda outputs, batch: 0.3 * sum(p.square().sum() for p in kept))


@part()
def meta_loss_reads_an_optimizer(parts: Parts) -> None:
    owner = torch.optim.SGD(parts.student.parameters(), lr=1.0)
    parts.meta_terms.append(
        lambda outputs, batch: 0.3 * sum(p.square().sum() for g in owner.param_groups for p in g["params"])
    )


@part(by_autograd=True)
def gradient_penalty(parts: Parts) -> None:
    student = parts.student

    def term(outputs: Any, batch: Any) -> Tensor:
        with torch.enable_grad():
            z = torch.tanh(student.first(batch.inputs)).detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(student.head(z)).sum(), z, create_graph=True)
        return g.square().sum(1)

    parts.terms["penalty"] = term


@part()
def inner_autograd(parts: Parts) -> None:
    def force(self: Any, z: Tensor) -> Any:
        with torch.enable_grad():
            x = z if z.requires_grad else z.detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(self.layer(x)).square().sum(), x, create_graph=True)
        return g

    parts.add(Stage(force))


# Wide operations.


@part()
def ensemble_by_vmap(parts: Parts) -> None:
    class Ensemble(Loose):
        def __init__(self) -> None:
            super().__init__()
            members = [linear() for _ in range(2)]
            params, _ = stack_module_state(members)
            self.weight, self.bias = (nn.Parameter(params[name].detach()) for name in ("weight", "bias"))
            self.base = [members[0].to("meta")]

        def forward(self, z: Tensor) -> Tensor:
            def one(p: dict[str, Tensor]) -> Tensor:
                return torch.tanh(functional_call(self.base[0], p, (z,)))

            return vmap(one)({"weight": self.weight, "bias": self.bias}).mean(0)

    parts.add(Ensemble())


@stage()
def checkpointed(self: Any, z: Tensor) -> Any:
    return checkpoint(lambda z: torch.tanh(self.layer(z)), z, use_reentrant=False)


@stage(norm=lambda: nn.BatchNorm1d(WIDTH), by_autograd=True)
def checkpointed_norm(self: Any, z: Tensor) -> Any:
    return checkpoint(lambda z: torch.tanh(self.norm(self.layer(z))), z, use_reentrant=False)


@part()
def dropout(parts: Parts) -> None:
    parts.add(nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.3)))


class Scripted(Loose):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) * 1.1


@part()
def scripted(parts: Parts) -> None:
    parts.add(torch.jit.script(Scripted()))


@part(slow=True)
def compiled(parts: Parts) -> None:
    layer: Any = torch.compile(nn.Sequential(linear(), nn.Tanh()), backend="aot_eager")
    parts.add(layer)


class Recurrent(Loose):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.net = kind(2, WIDTH, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = self.net(z.reshape(len(z), 3, 2))[0][:, -1]
        return found


@part()
def lstm(parts: Parts) -> None:
    parts.add(Recurrent(nn.LSTM))


@part()
def gru(parts: Parts) -> None:
    parts.add(Recurrent(nn.GRU))


@part()
def attention(parts: Parts) -> None:
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True, activation=F.gelu)
    parts.add(nn.Sequential(nn.Unflatten(1, (3, 2)), layer, nn.Flatten()))


@part()
def sdpa_causal(parts: Parts) -> None:
    def attended(self: Any, z: Tensor) -> Any:
        q = self.layer(z).reshape(len(z), 1, 3, 2)
        return F.scaled_dot_product_attention(q, q, q.tanh(), is_causal=True).reshape(len(z), WIDTH)

    parts.add(Stage(attended))


def embedded(sparse: bool) -> Stage:
    def added(self: Any, z: Tensor) -> Any:
        rows = torch.arange(len(z)) % 4
        return torch.tanh(self.layer(z + self.table(rows)))

    return Stage(added, table=nn.Embedding(4, WIDTH, sparse=sparse))


@part()
def embedding(parts: Parts) -> None:
    parts.add(embedded(False))


@part()
def embedding_sparse(parts: Parts) -> None:
    parts.add(embedded(True))


@part()
def complex_layer(parts: Parts) -> None:
    class Spectral(Loose):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))

        def forward(self, z: Tensor) -> Any:
            return torch.fft.irfft(torch.fft.rfft(z) * self.weight.to(torch.complex128), n=WIDTH).to(z).tanh()

    parts.add(Spectral())


@part()
def convolution(parts: Parts) -> None:
    parts.add(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.GELU(), nn.Flatten()))
    parts.add(nn.Linear(12, WIDTH))


@part()
def group_norm(parts: Parts) -> None:
    parts.add(nn.Sequential(linear(), nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH)))


@part()
def experts(parts: Parts) -> None:
    def routed(self: Any, z: Tensor) -> Any:
        gates = self.layer(z).softmax(1)[:, :2]
        self.load = (gates.mean(0) * gates).sum(1)
        kept = gates.topk(1, dim=1)
        out = torch.zeros_like(z)
        for i, expert in enumerate(self.experts):
            rows = (kept.indices[:, 0] == i).nonzero()[:, 0]
            out = out.index_add(0, rows, torch.tanh(expert(z[rows])) * kept.values[rows])
        return out

    parts.add(Stage(routed, experts=nn.ModuleList([linear(), linear()])))
    made = parts.last
    parts.terms["load"] = lambda outputs, batch: made.load


class Slots:
    __slots__ = ("source",)

    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(3)


@stage(slots=Slots)
def generator_in_slots(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z) * torch.rand(z.shape, generator=self.slots.source).to(z))


@stage(numbers=lambda: itertools.cycle((0.5, 1.0, 1.5)))
def scale_of_an_iterator(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * next(self.numbers)


@part(by_autograd=True)
def index_of_many(parts: Parts) -> None:
    """Holds more objects than a walk looks at, and statistics behind them."""
    index = {c: [(i, object()) for i in range(900)] for c in range(60)}
    norm = nn.Sequential(nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False)))
    parts.add(Stage(lambda self, z: self.norm(self.layer(z)).tanh(), index=index, norm=norm))


@part(by_autograd=True)
def switched_later(parts: Parts) -> None:
    """Changes what it does to gradients in the meta pass alone."""

    def turned(self: Any, z: Tensor) -> Any:
        self.calls += 1
        z = torch.tanh(self.layer(z))
        if z.requires_grad and self.calls % 2 == 0:
            z.register_hook(lambda g: -0.5 * g)
        return z

    parts.add(Stage(turned, calls=0))


# Outputs.


class Outputs(NamedTuple):
    logits: Tensor
    more: Any = None


@dataclass
class Answer:
    logits: Tensor
    note: str = "note"


class OwnDict(dict):  # type: ignore[type-arg]
    @property
    def logits(self) -> Tensor:
        return self["logits"]  # type: ignore[no-any-return]


def outputs_as(wrap: Callable[[Tensor], Any], logits: Callable[[Any], Tensor]) -> Callable[[Parts], None]:
    def add(parts: Parts) -> None:
        parts.student.wrap, parts.logits.function = wrap, logits

    return add


for _name, _wrap, _logits in (
    ("outputs_mapping", lambda z: {"logits": z, "n": 3}, lambda o: o["logits"]),
    ("outputs_own_mapping", lambda z: OwnDict(logits=z), lambda o: o.logits),
    ("outputs_namedtuple", lambda z: Outputs(z, [z * 2]), lambda o: o.logits),
    ("outputs_dataclass", lambda z: Answer(z), lambda o: o.logits),
    ("outputs_list", lambda z: [z, None, "text"], lambda o: o[0]),
):
    INGREDIENTS[_name] = Ingredient(outputs_as(_wrap, _logits))


# Behaviour by mode.


@stage()
def by_training(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if self.training else 0.5)


@stage()
def by_grad_mode(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if torch.is_grad_enabled() else 0.5)


@stage()
def by_requires_grad(self: Any, z: Tensor) -> Any:
    return torch.tanh(self.layer(z)) * (1.5 if self.layer.weight.requires_grad else 0.5)


@stage()
def checks_the_parameter_class(self: Any, z: Tensor) -> Any:
    known = [p for p in self.layer.__dict__["_parameters"].values() if isinstance(p, nn.Parameter)]
    return torch.tanh(self.layer(z)) + 0.1 * sum((p.square().sum() for p in known), start=z.new_zeros(()))


@stage(by_autograd=True)
def straight_through(self: Any, z: Tensor) -> Any:
    z = torch.tanh(self.layer(z))
    return z + (z.round(decimals=1) - z).detach()


@stage()
def frozen_batch_norm_switches(self: Any, z: Tensor) -> Any:
    self.train(not self.training)
    self.train(not self.training)
    return torch.tanh(self.layer(z))


@functools.lru_cache
def names() -> tuple[str, ...]:
    return tuple(INGREDIENTS)


def walk_parts(chosen: Iterator[str]) -> Parts:
    """The parts of a recipe, in order."""
    parts = Parts()
    for name in chosen:
        INGREDIENTS[name].add(parts)
    return parts
