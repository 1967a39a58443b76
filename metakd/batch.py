"""`Batch`, and the conversion of a data loader's items."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from metakd._basics.columns import check_columns
from metakd._basics.nest import map_tensors, tensors
from metakd._basics.positive_int import positive_int
from metakd._basics.sizes import UndecidedError, decided, described, is_integer
from metakd.errors import MetaKDError

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
        inputs: the student's arguments. A tuple or list holds positional arguments, a mapping keyword arguments;
            anything else, such as a tensor or a `PackedSequence`, is the only argument.
        targets: labels, or whatever the terms compare with, first dimension B; or None.
        teacher: the teacher's outputs for these inputs, a list for several teachers; or None.
        index: the samples' positions in the training set, shape (B,); only `SampleTable` needs them.
        size: B, if targets, outputs and inputs do not show it; or None.
        columns: name -> integers (B,), such as each sample's source, annotator or domain, for `GroupTable`, histories
            and exported weights; or None.

    Examples:
        >>> import torch
        >>> batch = Batch(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
        >>> batch.teacher is None
        True
        >>> batch._replace(columns={"source": torch.tensor([5, 5, 0, 2])}).columns["source"].tolist()
        [5, 5, 0, 2]
    """

    inputs: Any
    targets: Any = None
    teacher: Any = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    size: int | None = None
    columns: Mapping[str, Tensor] | None = None


def as_batch(item: Any) -> Batch:
    """Turn a loader's item into a `Batch`, or raise.

    It may be a `Batch`; a tensor or a `PackedSequence` (inputs only); `(inputs, targets)`; `(inputs, targets, index)`;
    either of these two with a mapping of named columns at its end, `(inputs, targets, {"source": ids})`; a mapping with
    `Batch`'s fields; or a mapping without the key `inputs`, as Hugging Face's collators build it. In the last, the
    labels become the targets, and all keys but `index`, `teacher` and `columns` become the student's keyword arguments.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor | PackedSequence):
        return Batch(item)
    if isinstance(item, Mapping):
        return _from_mapping(dict(item))
    columns = None
    if isinstance(item, tuple | list) and len(item) > 2 and isinstance(item[-1], Mapping):
        item, columns = item[:-1], item[-1]
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        inputs, targets, *rest = item
        return Batch(inputs, targets, index=_positions(rest[0]) if rest else None, columns=columns)
    if isinstance(item, tuple | list) and len(item) > 3:
        entries = ", ".join(f"item[{i}] {described(entry)}" for i, entry in enumerate(item[:6]))
        raise MetaKDError(
            f"a loader's item of type {type(item).__name__} of length {len(item)} is ambiguous: {entries}"
            f"{', ...' if len(item) > 6 else ''}; say which is what, such as "
            "batch_fn=lambda item: Batch(inputs=(item[0], item[1]), targets=item[2], index=item[3]). A Batch has "
            "inputs, targets, teacher (its outputs), index (positions in the training set) and columns (integers by "
            'name, such as {"source": item[3]})'
        )
    length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    raise MetaKDError(
        f"a loader's item of type {type(item).__name__}{length} is not understood; yield (inputs, targets), "
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
                f"the mapping from the loader has the keys {unknown} besides 'inputs', but a Batch has only "
                f"{list(Batch._fields)}: rename or drop them, or pass batch_fn="
            )
        return Batch(**item)
    keys, target_keys = list(item), [key for key in _TARGET_KEYS if key in item]
    targets = item.pop(target_keys[0]) if target_keys else None
    index, teacher, columns = (item.pop(key, None) for key in ("index", "teacher", "columns"))
    if not item:
        raise MetaKDError(
            f"the mapping from the loader holds no inputs for the student, only the keys {keys}; add a key 'inputs' "
            "or the student's keyword arguments"
        )
    return Batch(item, targets, teacher, index, columns=columns)


def detached_copy(batch: Batch) -> Batch:
    """Copy a batch, detached, for a pass that may write to its inputs."""
    copy: Batch = map_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), batch)
    return copy


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Repeat a loader's batches forever; raise if it is empty, or is an iterator that ends."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty or isinstance(loader, Iterator):
            raise MetaKDError(
                "the meta batches ended before the training batches: pass the loader itself, which restarts, or an "
                "endless iterator; it must hold at least one batch"
            )


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The student's positional and keyword arguments for a batch's inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # A packed sequence is a tuple, but layers take it as one argument.
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return (tuple(inputs) if several else (inputs,)), {}


def batch_size(batch: Batch, what: str, outputs: Tensor | None = None) -> int:
    """The number of samples in a batch, or raise; `what` names the batch in errors."""
    return counted(batch, what, outputs)[0]


def counted(batch: Batch, what: str, outputs: Tensor | None = None) -> tuple[int, str]:
    """The number of samples in a batch, and the part of the batch that shows it."""
    if batch.size is not None:
        return positive_int(batch.size, f"the size of {what}"), "the batch, by its size"
    inputs, targets = batch.inputs, batch.targets
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
        size = targets.shape[:1]
        if size == inputs.shape[:1] and any(size):  # what `decided` would find, in the commonest case
            return size[0], "batch.targets"
    args, kwargs = arguments(inputs)
    several = len(args) != 1 or args[0] is not batch.inputs
    return decided(what, batch.targets, outputs, [*args, *kwargs.values()], several=several)


def check_size(batch: Batch, what: str) -> None:
    """`batch_size` as a check, of the columns too; an undecided size is left for the student's outputs to decide."""
    size = None
    with suppress(UndecidedError):
        size = batch_size(batch, what)
    if batch.columns is not None:
        check_columns(batch.columns, what, size)
