"""The walk over all Python objects that a student's code can read and write."""

from __future__ import annotations

import functools
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from metakd._virtual.variables import Cell, ClassVariables, Scripted, Slots, Variables, slots_of

_LONGEST = 2_000  # the walk enters containers up to this length; data sets are longer
_KEPT = 20_000  # contents are kept up to this length
_MOST = 20_000  # objects per walk

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_parameters", "_buffers", "_modules")
_OF_MODULES = {*vars(nn.Module()), *HOOKS, *_PARTS} - {"training"}
_OF_HOOKS = [name for name, v in vars(nn.Module()).items() if isinstance(v, dict) and name not in _PARTS]
_PLAIN = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, list, tuple, set, frozenset, deque}
_LEAVES = _PLAIN | {Tensor, nn.Parameter}
_OF_DATA = {"argparse", "collections", "types"}  # their objects hold the user's data
_NOT_THE_USERS = {"torch", "torchopt", "torchvision", "numpy", "metakd", "builtins", *sys.stdlib_module_names} - {
    "__main__"
}


class Places:
    """Where code can store state.

    Attributes:
        mappings: dicts, attributes of objects, and variables of functions.
        lists: lists and deques.
        sets: sets.
        long: lists, deques and dicts that are too long to enter.
        endless: even longer containers, of which only the length is kept.
        hooks: every module's dicts of hooks.
        generators: random generators other than the global ones.
        arrays: NumPy arrays.
        modules: all modules, including those that terms and hooks hold.
        walked: all objects that the walk has entered.
    """

    def __init__(self) -> None:
        self.mappings: list[MutableMapping[Any, Any]] = []
        self.lists: list[Any] = []
        self.sets: list[set[Any]] = []
        self.long: list[Any] = []
        self.endless: list[Any] = []
        self.hooks: list[dict[Any, Any]] = []
        self.generators: list[Any] = []
        self.arrays: list[Any] = []
        self.modules: list[nn.Module] = []
        self.walked: list[Any] = []

    def marks(self) -> list[int]:
        """How many attributes every parameter has: those of one without any are not among the places."""
        return [len(vars(p)) for m in self.modules for p in m._parameters.values() if p is not None]

    def signature(self) -> tuple[Any, ...]:
        """What decides where a walk goes: the objects, other than leaves, that every place holds.

        All of them stay alive with the places, so that no other object takes over an id.
        """
        held = [[id(v) for v in m.values() if type(v) not in _LEAVES] for m in self.mappings]
        held += [[id(v) for v in values if type(v) not in _LEAVES] for values in (*self.lists, *self.sets)]
        hooked = [[id(hook) for hook in hooks.values()] for hooks in self.hooks]
        lengths = [len(found) > _LONGEST for found in (*self.lists, *self.sets, *self.mappings)]
        longer = [len(found) > _KEPT for found in self.long], [len(found) <= _LONGEST for found in self.long]
        return held, self.marks(), hooked, lengths, longer, [len(found) <= _KEPT for found in self.endless]


class Walk:
    """A walk that is taken again only if it would lead elsewhere than the last time.

    Examples:
        >>> walk, log = Walk(), {"calls": 0}
        >>> first, log["calls"] = walk.places([log]), 1
        >>> walk.places([log]) is first
        True
        >>> log["losses"] = []
        >>> walk.places([log]) is first
        False
    """

    def __init__(self) -> None:
        self._last: tuple[list[Any], tuple[Any, ...], Places] | None = None

    def __deepcopy__(self, memo: Any) -> Walk:
        return Walk()  # the copy's objects are others

    def places(self, roots: Iterable[Any], excluded: Iterable[Any] = (), unchanged: Places | None = None) -> Places:
        """Where code can store state now; see `reach`. `unchanged` are places known to hold what they held."""
        roots, excluded = list(roots), list(excluded)
        ends = [*roots, *excluded, *_global_hooks()]
        if self._last is not None:
            known, signature, places = self._last
            same = len(ends) == len(known) and all(map(is_, ends, known))
            if same and (places is unchanged or places.signature() == signature):
                return places
        places = reach(roots, excluded)
        self._last = ends, places.signature(), places
        return places


def reach(roots: Iterable[Any], excluded: Iterable[Any] = ()) -> Places:
    """Walk from the roots (student, terms, hooks) to all they hold: attributes, containers, closures, global variables.

    The walk enters modules, containers and generators, and other objects if their class is from a package of the roots.
    Global and class variables count only in the user's own code. Objects in `excluded` are skipped.
    """
    roots = list(roots)
    places, known = Places(), {id(value) for value in excluded}
    packages = {_package(of) for root in roots for of in _owners(root)} - _NOT_THE_USERS
    # Containers inside containers come last, in case the walk reaches its limit: data lies there, and seldom modules.
    waiting, data = deque([*roots, *_global_hooks()]), deque[Any]()
    while (waiting or data) and len(known) < _MOST:
        value = (waiting or data).popleft()
        if id(value) not in known:
            known.add(id(value))
            places.walked.append(value)  # keeps it alive, as a new object could reuse the id
            parts = [v for v in _parts(value, places, packages) if type(v) not in _LEAVES]
            (data if type(value) in _CONTAINERS else waiting).extend(parts)
    return places


def _owners(root: Any) -> Iterator[Any]:
    """Functions and classes whose packages hold the user's code."""
    if isinstance(root, nn.Module):
        for module in root.modules():
            yield type(module)
            for kind in HOOKS:
                yield from map(bare, vars(module).get(kind, {}).values())
    else:
        yield bare(root)


def bare(function: Any) -> Any:
    """The function inside a hook's wrapper, a partial or a bound method; the class of any other object.

    Examples:
        >>> bare(functools.partial(reach, [])) is reach, bare(nn.Tanh())
        (True, <class 'torch.nn.modules.activation.Tanh'>)
    """
    while not isinstance(function, types.FunctionType | type):
        inner = next((v for k in ("hook", "func", "__func__") if (v := _attribute(function, k)) is not None), None)
        if inner is None:
            return type(function)
        function = inner
    return function


def _global_hooks() -> list[Any]:
    """Hooks that torch runs for all modules."""
    of_torch = vars(nn.modules.module)
    return [hook for kind in HOOKS for hook in of_torch.get(f"_global{kind}", {}).values()]


def _attribute(value: Any, name: str) -> Any:
    own = isinstance(value, functools.partial | types.MethodType)
    return getattr(value, name, None) if own else _vars(value).get(name)


def _vars(value: Any) -> dict[str, Any]:
    """An object's `__dict__`, or an empty one."""
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}


def _package(of: Any) -> str:
    return _package_of(getattr(of, "__module__", None) or "builtins")


def _package_of(module: str) -> str:
    return str(module).partition(".")[0]


def _parts(value: Any, places: Places, packages: set[str]) -> Iterable[Any]:
    """Record where the object stores state, and return what it holds."""
    if isinstance(value, nn.Module):
        return _of_module(value, places)
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, types.FunctionType):
        return _of_function(value, places)
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, type):
        return _of_class(value, places)
    if isinstance(value, types.BuiltinFunctionType):  # such as log.append
        return (value.__self__,)
    if isinstance(value, types.ModuleType):
        return ()
    if _is_generator(value):
        places.generators.append(value)
        return ()
    if isinstance(value, tuple | frozenset):
        return value if len(value) <= _LONGEST else ()
    if isinstance(value, dict | list | deque | set):
        return _of_container(value, places)
    if _is_array(value):
        places.arrays.append(value)
        return ()
    if type(value).__name__ == "_WrappedHook":
        return (value.hook,)
    package = _package(type(value))
    return _of_object(value, places) if package in packages or package in _OF_DATA else ()


def _of_object(value: Any, places: Places) -> Iterable[Any]:
    held: list[Any] = []
    if isinstance(attributes := getattr(value, "__dict__", None), dict):
        places.mappings.append(attributes)
        held += attributes.values()
    if slots_of(value):
        places.mappings.append(slots := Slots(value))
        held += slots.values()
    return (*held, type(value))


def _of_container(value: Any, places: Places) -> Iterable[Any]:
    if len(value) > _KEPT:
        places.endless.append(value)
        return ()
    if len(value) > _LONGEST and not isinstance(value, set):
        places.long.append(value)
        return ()
    if isinstance(value, dict):
        places.mappings.append(value)
        return list(value.values())
    (places.sets if isinstance(value, set) else places.lists).append(value)
    return list(value)


def _of_module(module: nn.Module, places: Places) -> Iterable[Any]:
    places.modules.append(module)
    if isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
        places.mappings += [Scripted(module._parameters), Scripted(module._buffers)]
        return list(module._modules.values())
    attributes = vars(module)
    places.mappings += [attributes, module._parameters, module._buffers, module._modules]
    places.hooks += [attributes[name] for name in _OF_HOOKS if name in attributes]
    held = [v for name, v in attributes.items() if type(v) not in _LEAVES and name not in _OF_MODULES]
    hooks = [hook for kind in HOOKS if (found := attributes.get(kind)) for hook in found.values()]
    marked = [marks for p in module._parameters.values() if p is not None and (marks := vars(p))]
    return (*held, *hooks, *marked, *module._modules.values(), type(module))


def _of_class(owner: type, places: Places) -> Iterable[Any]:
    """The methods and variables of a user's class, and its bases."""
    if not _local(owner.__module__):
        return owner.__bases__ if _package(owner) not in _NOT_THE_USERS else ()
    places.mappings.append(ClassVariables(owner))
    return [*(getattr(v, "__func__", v) for v in vars(owner).values()), *owner.__bases__]


def _of_function(function: types.FunctionType, places: Places) -> Iterable[Any]:
    if _package(function) == "metakd":
        return ()  # the library's own hooks hold no state of a pass
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    places.mappings += [Cell(cell) for cell in function.__closure__ or ()]
    held += [value for cell in function.__closure__ or () for value in Cell(cell).values()]
    places.mappings.append(function.__dict__)
    held += function.__dict__.values()
    if _local(function.__module__):
        variables = Variables(function.__globals__, _names(function.__code__))
        places.mappings.append(variables)
        held += variables.values()
    return held


@functools.lru_cache(maxsize=4096)
def _local(module: str | None) -> bool:
    """Whether a module is the user's own code, not an installed package or Python's."""
    if module is None or _package_of(module) in _NOT_THE_USERS:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    installed = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")]
    return file is None or not any(file.startswith(folder) for folder in installed)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function's code mentions, including inner functions."""
    inside = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return tuple(dict.fromkeys([*code.co_names, *inside]))


def _is_generator(value: Any) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
