"""How many samples a batch has, read from the shapes of its parts; and short descriptions of parts for errors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from metakd.errors import MetaKDError


class Sizes(NamedTuple):
    """Possible numbers of samples in a value, the likeliest first; `sure` if the first needs no confirmation."""

    possible: tuple[int, ...] = ()
    sure: bool = False


def possible_sizes(value: Any) -> Sizes:
    """Numbers of samples that the form of a value allows.

    A tensor gives its first dimension, a `PackedSequence` the width of its first step, a sequence of mappings or
    scalars its length. A nest gives the size on which its parts agree. If they disagree, a list has one sample per
    element, but a tuple may be like CTC's `(labels, lengths)`: any of the parts' sizes is possible.

    Examples:
        >>> import torch
        >>> a, b = torch.zeros(4), torch.zeros(7)
        >>> possible_sizes(a), possible_sizes([a, b]).possible, possible_sizes((b, a)).sure
        (Sizes(possible=(4,), sure=True), (2, 4, 7), False)
    """
    if isinstance(value, Tensor):
        return Sizes((value.size(0),), True) if value.ndim > 0 else Sizes()
    if isinstance(value, PackedSequence):
        return Sizes((int(value.batch_sizes[0]),), True)
    if isinstance(value, Mapping):
        return of_parts(list(value.values()))
    if isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            return of_parts(list(value))
        if value and all(isinstance(part, Mapping) or _is_scalar(part) for part in value):
            return Sizes((len(value),), True)
        found = of_parts(list(value))
        each = (len(value),) if found.possible else ()
        if found.sure:
            return Sizes((*dict.fromkeys(found.possible + each),), True)
        return Sizes((*dict.fromkeys(each + found.possible),), isinstance(value, list) and bool(each))
    return Sizes()


def of_parts(parts: list[Any]) -> Sizes:
    """The sizes shared by all parts that have one, sure if one part is; without shared sizes all of theirs, unsure."""
    found = [sizes for part in parts if (sizes := possible_sizes(part)).possible]
    found.sort(key=lambda sizes: not sizes.sure)
    union = tuple(dict.fromkeys(size for sizes in found for size in sizes.possible))
    shared = tuple(size for size in union if all(size in sizes.possible for sizes in found))
    return Sizes(shared, found[0].sure) if shared else Sizes(union)


class UndecidedError(MetaKDError):
    """The parts of a batch allow several sizes."""


def decided(what: str, targets: Any, outputs: Any, inputs: list[Any], *, several: bool) -> tuple[int, str]:
    """The number of samples, and the part that shows it: the targets, else the outputs, else the inputs.

    If that part allows several numbers, the first one that another part allows wins.

    Args:
        what: the batch's name in errors.
        targets: or None.
        outputs: the student's, or None if unknown.
        inputs: the student's arguments.
        several: whether the user gave several arguments. A single one must hold as many samples as the targets.

    Raises:
        MetaKDError: no part shows a number, parts contradict each other, or there is no sample.
    """
    given = of_parts(inputs)
    parts = {"batch.targets": possible_sizes(targets), "the outputs": possible_sizes(outputs), "batch.inputs": given}
    source = next((name for name, sizes in parts.items() if sizes.possible), "")
    if not source or _is_scalar(targets):
        raise MetaKDError(
            f"cannot tell how many samples {what} has: it holds no tensor with a batch dimension; give inputs and "
            "targets of shape (B, ...), such as the labels as Batch(targets=...), or the number as Batch(size=...)"
        )
    told = parts.pop(source)
    if told.possible[0] == 0:
        raise MetaKDError(f"{what} is empty (batch size 0); its loader must yield at least one sample")
    bound = source == "batch.targets" and not several and (given.possible or _is_scalar(inputs[0]))
    allowed = given.possible if bound else [size for sizes in parts.values() for size in sizes.possible]
    agreed = [size for size in told.possible if size in allowed]
    if bound and not agreed:
        shape = f"shape {tuple(inputs[0].shape)}" if isinstance(inputs[0], Tensor) else f"{_either(given)} samples"
        raise MetaKDError(
            f"{what} has inputs of {shape} but {_either(told)} targets; both need the same first dimension, or else "
            "give the number of samples as Batch(size=...)"
        )
    if not agreed and not told.sure:
        also = "".join(f", by {name} {_either(sizes)}" for name, sizes in parts.items() if sizes.possible)
        raise UndecidedError(
            f"cannot tell how many samples {what} has: by {source} {_either(told)}{also}; give their number as "
            "Batch(size=...)"
        )
    return (agreed or told.possible)[0], source


def described(value: Any) -> str:
    """A value in a few words: its type, and its shape or contents."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if type(value) in (tuple, list):
        return f"({', '.join(map(described, value))})"
    return "None" if value is None else type(value).__name__


def is_integer(value: Tensor) -> bool:
    """Whether a tensor holds integers; booleans do not count."""
    dtype = value.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _either(sizes: Sizes) -> str:
    *most, last = map(str, sizes.possible)
    return f"{', '.join(most)} or {last}" if most else last


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0
