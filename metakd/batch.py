"""`Batch`, and how a data loader's item becomes one."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metakd.errors import MetaKDError

_TARGET_KEYS = ("targets", "labels", "label", "target", "y")


class Batch(NamedTuple):
    """One batch, as every term, weight model and feature function sees it.

    Attributes:
        inputs: what the student is called with: a tensor is passed as the only argument, a tuple or list
            as positional arguments, a mapping as keyword arguments.
        targets: the labels or whatever the terms compare with, first dimension B; or None.
        teacher: the teacher's outputs for these inputs; or None.
        index: positions of the samples in the training set, shape (B,); needed by `SampleTable` alone.

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


def as_batch(item: Any) -> Batch:
    """Turn a loader's item into a `Batch`.

    Taken are a `Batch`; a tensor (inputs alone); `(inputs, targets)`; `(inputs, targets, index)`; a mapping
    with the key `inputs` and any of `Batch`'s other fields; and a mapping without it, as Hugging Face's
    collators build it: its labels become the targets, its `index` and `teacher` the fields of that name,
    and all the rest keyword arguments of the student.

    Raises:
        MetaKDError: the item is none of these.

    Examples:
        >>> import torch
        >>> as_batch({"input_ids": torch.ones(2, 5), "labels": torch.tensor([0, 1])}).inputs.keys()
        dict_keys(['input_ids'])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch(item)
    if isinstance(item, Mapping):
        return _from_mapping(dict(item))
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        inputs, targets, *index = item
        return Batch(inputs, targets, index=index[0] if index else None)
    length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    raise MetaKDError(
        f"a loader's item of type {type(item).__name__}{length} is not understood; give (inputs, targets), "
        "(inputs, targets, index), a mapping or a Batch, or pass batch_fn= to turn your items into a Batch"
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


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and mappings, in order.

    Examples:
        >>> import torch
        >>> len(tensors({"a": torch.ones(1), "b": [torch.ones(2), "text", None]}))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in tensors(part)]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors(part)]
    return []


def map_tensors(function: Any, value: Any) -> Any:
    """The same nest with `function` applied to every tensor; other leaves stay as they are.

    Examples:
        >>> import torch
        >>> map_tensors(lambda t: t.double(), Batch(torch.zeros(1), torch.zeros(1))).inputs.dtype
        torch.float64
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def batch_size(batch: Batch, what: str) -> int:
    """The number of samples in a batch; `what` names it in the error.

    Raises:
        MetaKDError: the batch holds no tensor, no sample, or inputs and targets of different lengths.

    Examples:
        >>> import torch
        >>> batch_size(Batch(torch.zeros(4, 3)), "the batch")
        4
    """
    found = tensors(batch.targets) or tensors(batch.inputs)
    if not found or found[0].ndim == 0:
        raise MetaKDError(f"{what} holds no tensor with a batch dimension; give inputs and targets of shape (B, ...)")
    size = found[0].shape[0]
    if size == 0:
        raise MetaKDError(f"{what} is empty (batch size 0); its loader must yield at least one sample")
    if isinstance(batch.inputs, Tensor) and (batch.inputs.ndim == 0 or batch.inputs.shape[0] != size):
        raise MetaKDError(
            f"{what} has inputs of shape {tuple(batch.inputs.shape)} but {size} targets; "
            "both need the same first dimension"
        )
    return size
