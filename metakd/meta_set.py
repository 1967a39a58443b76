"""The meta images among the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metakd._basics.sizes import described
from metakd.batch import Batch, as_batch, batch_size, endless
from metakd.errors import MetaKDError

FROM_META = "from_meta"


def meta_in_training(
    batches: Iterable[Any],
    meta_batches: Iterable[Any] | tuple[Iterable[Any], ...],
    *,
    batch_fn: Callable[[Any], Batch] = as_batch,
) -> Iterator[tuple[Batch, Any]]:
    """Training batches with a batch of meta images in each, and another meta batch to judge the step by.

        weighting = Pinned(GroupTable("source", 20, terms=1), weight=1.0)
        for batch, meta_batch in meta_in_training(train_loader, meta_loader):
            loss = balancer(batch, meta_batch)

    In a joined batch the column `from_meta` is 1 for the meta images, and `weighting.Pinned` gives them a weight of
    their own. The weighted loss is the mean over all rows: smaller meta batches among the training images count less.

    A student that trains on the meta images lowers the meta loss by itself. On the digits the weights are none the
    worse for it (`python benchmarks/table_rates.py`). Should they be on your data, split the meta set and pass a tuple
    of loaders, one for each part: the images of a part are trained on in one step, and judge in another.

    Args:
        batches: the training loader.
        meta_batches: the meta loader, which restarts when it ends; or a tuple of loaders, one for each part.
        batch_fn: loader item -> `Batch`, as the balancer's.

    Returns:
        An iterator over pairs of a joined batch and a meta batch, in the order of the training loader.

    Raises:
        MetaKDError: there is no meta batch; inputs, targets or teacher's outputs cannot be joined.

    Examples:
        >>> train = [(torch.zeros(4, 2), torch.zeros(4).long(), {"source": torch.arange(4)})]
        >>> meta = [(torch.ones(2, 2), torch.ones(2).long()), (torch.ones(3, 2), torch.ones(3).long())]
        >>> (batch, meta_batch), = meta_in_training(train, meta)
        >>> batch.columns["source"].tolist(), batch.columns["from_meta"].tolist(), len(meta_batch[1])
        ([0, 1, 2, 3, -1, -1], [0, 0, 0, 0, 1, 1], 3)
    """
    folds = [endless(fold) for fold in (meta_batches if isinstance(meta_batches, tuple) else (meta_batches,))]
    if not folds:
        raise MetaKDError("meta_batches is an empty tuple; pass a loader, or a tuple of loaders")
    for step, item in enumerate(batches):
        among = batch_fn(next(folds[step % len(folds)]))
        yield joined(batch_fn(item), among), next(folds[(step + 1) % len(folds)])


def joined(batch: Batch, meta_batch: Batch) -> Batch:
    """The samples of both batches as one; the column `from_meta` is 1 for those of the second, else 0.

    An index or column that one of them lacks is -1 for its samples.

    Raises:
        MetaKDError: inputs, targets or teacher's outputs cannot be joined.
    """
    sizes = batch_size(batch, "the batch"), batch_size(meta_batch, "the meta batch")

    def both(first: Any, second: Any) -> Tensor:
        filled = [
            torch.full((size,), -1, dtype=torch.long) if values is None else values
            for values, size in zip((first, second), sizes, strict=True)
        ]
        device = next((values.device for values in (first, second) if values is not None), None)
        return torch.cat([values.to(device) for values in filled])

    own, other = batch.columns or {}, meta_batch.columns or {}
    columns = {name: both(own.get(name), other.get(name)) for name in {**own, **other} if name != FROM_META}
    columns[FROM_META] = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    return Batch(
        _cat(batch.inputs, meta_batch.inputs, "inputs"),
        _cat(batch.targets, meta_batch.targets, "targets"),
        _cat(batch.teacher, meta_batch.teacher, "the teacher's outputs"),
        None if batch.index is None and meta_batch.index is None else both(batch.index, meta_batch.index),
        None if batch.size is None and meta_batch.size is None else sum(sizes),
        columns,
    )


def _cat(first: Any, second: Any, what: str) -> Any:
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    if type(first) is type(second):
        if isinstance(first, Mapping) and first.keys() == second.keys():
            return {key: _cat(first[key], second[key], f"{what}[{key!r}]") for key in first}
        if isinstance(first, tuple | list) and len(first) == len(second):
            return type(first)([_cat(a, b, f"{what}[{k}]") for k, (a, b) in enumerate(zip(first, second, strict=True))])
    raise MetaKDError(
        f"the {what.removeprefix('the ')} of a training batch ({described(first)}) and of a meta batch "
        f"({described(second)}) cannot be joined: both need tensors of the same shape but for the first dimension, "
        "in the same containers; pass batch_fn= to make them so"
    )
