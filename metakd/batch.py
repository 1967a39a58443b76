"""`Batch`, and how a data loader's item becomes one."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import index
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from metakd.errors import MetaKDError
from metakd.nest import map_tensors, tensors
from metakd.sizes import UndecidedError, decided, described, is_integer

__all__ = [
    "Batch",
    "arguments",
    "as_batch",
    "batch_size",
    "check_size",
    "counted",
    "endless",
    "map_tensors",
    "tensors",
]

_TARGET_KEYS = ("targets", "labels", "label", "target", "y")


class Batch(NamedTuple):
    """One batch, as every term, weight model and feature function sees it.

    Attributes:
        inputs: what the student is called with: a tuple or list has its positional arguments, a mapping its keyword
            arguments; anything else, a tensor or a `PackedSequence`, is the only argument.
        targets: the labels or whatever the terms compare with, first dimension B; or None.
        teacher: the teacher's outputs for these inputs, of several teachers a list of theirs; or None.
        index: positions of the samples in the training set, shape (B,); needed by `SampleTable` alone.
        size: B, where the forms of targets, outputs and inputs do not tell it; or None.

    Examples:
        >>> import torch
        >>> batch = Batch(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
        >>> batch.teacher is None
        True
    """

    inputs: Any
    targets: Any = None
    teacher: Any = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    size: int | None = None


def as_batch(item: Any) -> Batch:
    """Turn a loader's item into a `Batch`.

    Taken are a `Batch`; a tensor or a `PackedSequence` (inputs alone); `(inputs, targets)`; `(inputs, targets, index)`;
    a mapping with the key `inputs` and any of `Batch`'s other fields; and a mapping without it, as Hugging Face's
    collators build it: its labels become the targets, its `index` and `teacher` the fields of that name, and all the
    rest keyword arguments of the student.

    Raises:
        MetaKDError: the item is none of these.

    Examples:
        >>> import torch
        >>> as_batch({"input_ids": torch.ones(2, 5), "labels": torch.tensor([0, 1])}).inputs.keys()
        dict_keys(['input_ids'])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor | PackedSequence):
        return Batch(item)
    if isinstance(item, Mapping):
        return _from_mapping(dict(item))
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        inputs, targets, *rest = item
        return Batch(inputs, targets, index=_positions(rest[0]) if rest else None)
    length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    raise MetaKDError(
        f"a loader's item of type {type(item).__name__}{length} is not understood; give (inputs, targets), "
        "(inputs, targets, index), a mapping or a Batch, or pass batch_fn= to turn your items into a Batch"
    )


def _positions(third: Any) -> Tensor | None:
    if third is None or (isinstance(third, Tensor) and third.ndim == 1 and is_integer(third)):
        return third
    raise MetaKDError(
        "the third item from the loader is read as the samples' positions in the training set, integers of shape "
        f"(B,), but it is {described(third)}; for two inputs and their targets pass "
        "batch_fn=lambda item: Batch(inputs=(item[0], item[1]), targets=item[2])"
    )


def _from_mapping(item: dict[str, Any]) -> Batch:
    if "inputs" in item:
        unknown = sorted(set(item) - set(Batch._fields))
        if unknown:
            raise MetaKDError(
                f"the mapping from the loader has the keys {unknown} beside 'inputs'; a Batch has only "
                f"{list(Batch._fields)}: rename or drop them, or pass batch_fn="
            )
        return Batch(**item)
    keys, target_keys = list(item), [key for key in _TARGET_KEYS if key in item]
    targets = item.pop(target_keys[0]) if target_keys else None
    index, teacher = item.pop("index", None), item.pop("teacher", None)
    if not item:
        raise MetaKDError(
            f"the mapping from the loader holds no inputs for the student, only the keys {keys}; add a key 'inputs', "
            "or the student's keyword arguments"
        )
    return Batch(item, targets, teacher, index)


def as_it_is(batch: Batch) -> Batch:
    """A copy of a batch, cut from autograd, for a pass that may write to its inputs.

    Examples:
        >>> import torch
        >>> mine = Batch(torch.zeros(2))
        >>> as_it_is(mine).inputs.add_(1.0), mine.inputs
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    copy: Batch = map_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), batch)
    return copy


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, again and again; an iterator gives those it has.

    Raises:
        MetaKDError: an iterator has ended, or a loader is empty.

    Examples:
        >>> batches = endless(["a", "b"])
        >>> [next(batches) for _ in range(3)]
        ['a', 'b', 'a']
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty or isinstance(loader, Iterator):
            raise MetaKDError(
                "the meta batches ended before the training batches: give the loader itself, which is begun anew, "
                "or an endless iterator; it must hold at least one batch"
            )


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the student for a batch's inputs.

    Examples:
        >>> arguments({"x": 1}), arguments([1, 2]), arguments(1)
        (((), {'x': 1}), ((1, 2), {}), ((1,), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # A packed sequence is a tuple for Python, and one argument for every layer that takes it.
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return (tuple(inputs) if several else (inputs,)), {}


def batch_size(batch: Batch, what: str, outputs: Tensor | None = None) -> int:
    """The number of samples in a batch; `what` names it in errors, and the student's outputs help to tell.

    Raises:
        MetaKDError: the batch holds no sample, inputs and targets of different lengths, or nothing that tells.

    Examples:
        >>> import torch
        >>> boxes = [{"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(1, 4)}]
        >>> batch_size(Batch(torch.zeros(4, 3)), "the batch"), batch_size(Batch(None, boxes), "the batch")
        (4, 2)
    """
    return counted(batch, what, outputs)[0]


def counted(batch: Batch, what: str, outputs: Tensor | None = None) -> tuple[int, str]:
    """The number of samples in a batch as `batch_size` tells it, and which part of the batch says so."""
    if batch.size is not None:
        return _given(batch.size, what), "the batch, by its size"
    args, kwargs = arguments(batch.inputs)
    several = len(args) != 1 or args[0] is not batch.inputs
    return decided(what, batch.targets, outputs, [*args, *kwargs.values()], several=several)


def check_size(batch: Batch, what: str) -> None:
    """As `batch_size`, but where the student's outputs may yet tell, that is left to them.

    Examples:
        >>> import torch
        >>> check_size(Batch((torch.zeros(4, 3), torch.zeros(2, 9))), "the batch")
    """
    with suppress(UndecidedError):
        batch_size(batch, what)


def _given(size: Any, what: str) -> int:
    if isinstance(size, bool) or not hasattr(size, "__index__") or index(size) < 1:
        raise MetaKDError(f"{what} has size={size!r}, it must be an integer of at least 1: the number of its samples")
    return index(size)
