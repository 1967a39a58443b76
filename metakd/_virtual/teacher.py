"""Runs the teacher and leaves it unchanged."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metakd._basics.module_call import call
from metakd._basics.nest import map_tensors
from metakd.errors import blamed

Teacher: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]
"""A module, any other callable that takes the student's inputs, or a sequence of these: an ensemble."""


def members(teacher: Any) -> list[Any] | None:
    """The teachers of an ensemble; None for a single teacher."""
    if isinstance(teacher, nn.ModuleList):
        return list(teacher)
    several = isinstance(teacher, Sequence) and not isinstance(teacher, str) and not callable(teacher)
    return list(teacher) if several else None


def teacher_outputs(teacher: Teacher, inputs: Any) -> Any:
    """Run the teacher without gradients, and in eval mode if it is a module; modes are restored.

    Exported modules run in the mode of their export; modules inside a function keep their mode. An ensemble gives a
    list.

    Raises:
        MetaKDError: the teacher raised an error (chained).
    """
    ensemble = members(teacher)
    one_or_all: list[Any] = [teacher] if ensemble is None else ensemble
    outputs = []
    for position, one in enumerate(one_or_all):
        name = "the teacher" if ensemble is None else f"teacher {position}"
        with blamed(name), _as_judge(one), torch.no_grad():
            # A captured graph or an engine gives the same memory every time, and a call keeps two batches' outputs.
            outputs.append(map_tensors(Tensor.clone, call(one, inputs)))
    torch.clear_autocast_cache()  # older torch would reuse gradient-free casts of parameters shared with the student
    return outputs[0] if ensemble is None else outputs


def _as_judge(teacher: Any) -> AbstractContextManager[None]:
    """A block with the teacher, or a method's owner, in eval mode."""
    owner = getattr(teacher, "__self__", teacher)  # of a method
    return in_eval_mode(owner) if isinstance(owner, nn.Module) else nullcontext()


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A block with the module in eval mode; every submodule gets its mode back."""
    # Frozen scripts have no mode.
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    if not any(mode for _, mode in modes):
        yield
        return
    mode_of_all = getattr(module, "training", False)
    try:
        try:
            module.eval()
        except NotImplementedError:  # an exported module
            for part, _ in modes:
                part.training = False
        yield
    finally:
        with suppress(NotImplementedError):
            module.train(mode_of_all)
        for part, mode in modes:
            part.training = mode
