"""The weights of all samples as a table in a file, for other trainers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from metakd._basics.columns import check_columns
from metakd._basics.sizes import described, is_integer
from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.monitor.learned_weights import answers

if TYPE_CHECKING:
    from metakd.balancer import BilevelLossBalancer


_ROWS = 64  # of a data set, in one batch


class _Read(NamedTuple):
    """One batch: its weights (B, M), its `index` (B,) or None, and its named columns, each (B,)."""

    weights: Tensor
    positions: Tensor | None
    columns: dict[str, Tensor]


def export_weights(balancer: BilevelLossBalancer, loader: Iterable[Any], path: str | Path) -> dict[str, list[Any]]:
    """Write the weight of every sample in every term as a table, one row for each.

    The columns are `index`, the batches' named columns if they have any, `term` and `weight`. `index` is the sample's
    position in the training set: `batch.index`, or without one the position in the order of the loader. The student
    is in eval mode, and nothing keeps a trace.

    With several processes, each writes the samples of its own loader; give each its own path.

    Args:
        balancer: with a weight model that has learned.
        loader: the training batches, best without augmentation; or a `datasets.Dataset` with the columns that
            `batch_fn` takes. Without an index it must not shuffle.
        path: ends with `.csv`, or with `.parquet` for Parquet, which needs pyarrow (the extra `export`). A file that
            is there is replaced.

    Returns:
        The table as it was written: name of the column -> its values.

    Raises:
        MetaKDError: the ending is another one, the folder or pyarrow is missing, a sample comes twice, positions or
            columns do not fit, or the weight model has weights only in calls with a hypergradient (`Rectified`).

    Examples:
        >>> import tempfile
        >>> from metakd import BilevelLossBalancer, terms, weighting
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer,
        ...                                weighting=weighting.TermScalars(1, init=0.5))
        >>> batch = torch.randn(2, 4), torch.tensor([0, 2]), torch.tensor([7, 5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = export_weights(balancer, [batch], f"{folder}/weights.csv")
        ...     print(Path(folder, "weights.csv").read_text())
        index,term,weight
        7,hard,0.5
        5,hard,0.5
        >>> table
        {'index': [7, 5], 'term': ['hard', 'hard'], 'weight': [0.5, 0.5]}
    """
    path = Path(path)
    write = _writer(path)
    loader = _batches(loader)
    if hasattr(balancer.weighting, "from_influence"):
        raise MetaKDError(
            f"{type(balancer.weighting).__name__} computes weights from the influence of one step, so there are none "
            "to export; keep balancer.report.weights of the steps, or train a weight model such as SampleTable"
        )
    read = answers(balancer, loader, _read)
    table = _table(read, _positions(read, loader), list(balancer.terms))
    write(table, path)
    return table


def _batches(data: Iterable[Any]) -> Iterable[Any]:
    """A loader; the rows of a `datasets.Dataset`, which is iterated row by row, in batches of tensors."""
    named = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(data).__mro__]
    if ("datasets", "Dataset") not in named:
        return data
    dataset: Any = data
    return DataLoader(dataset.with_format("torch"), batch_size=_ROWS)


def _read(features: Tensor, batch: Batch, weights: Tensor) -> _Read:
    index = batch.index
    if index is not None:
        if not isinstance(index, Tensor) or index.shape != weights.shape[:1] or not is_integer(index):
            raise MetaKDError(
                f"'index' of the batch must hold integers of shape ({len(weights)},), one per sample, but it is "
                f"{described(index)}; correct what the loader or batch_fn= gives"
            )
        index = index.cpu()
    columns = batch.columns or {}
    check_columns(columns, "the batch", len(weights))
    return _Read(weights.cpu(), index, {name: values.cpu() for name, values in columns.items()})


def _positions(read: list[_Read], loader: Iterable[Any]) -> list[int]:
    """The index of every sample, each once."""
    given = [part.positions for part in read if part.positions is not None]
    if not given:
        if _reorders(loader):
            raise MetaKDError(
                "the loader may change the order of the samples, and its batches have no index, so positions in the "
                "training set are unknown; yield (inputs, targets, index), or pass a loader with shuffle=False"
            )
        return list(range(sum(len(part.weights) for part in read)))
    if len(given) < len(read):
        raise MetaKDError(
            f"{len(given)} of {len(read)} batches have an index; give it to all of them, as (inputs, targets, index), "
            "or to none"
        )
    values, counts = torch.cat(given).unique(return_counts=True)
    if bool((counts > 1).any()):
        raise MetaKDError(
            f"{int((counts > 1).sum())} of {len(values)} samples come more than once, such as index "
            f"{int(values[counts.argmax()])}, {int(counts.max())} times; pass a loader that gives each sample once"
        )
    positions: list[int] = torch.cat(given).tolist()
    return positions


def _reorders(loader: Iterable[Any]) -> bool:
    """Whether a torch loader may hand out samples in another order than that of its data set."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    plain = type(loader.sampler) is SequentialSampler
    return not plain or (loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler)


def _table(read: list[_Read], positions: list[int], terms: list[str]) -> dict[str, list[Any]]:
    names = list(read[0].columns)
    for part in read:
        if part.columns.keys() != read[0].columns.keys():
            raise MetaKDError(
                f"the first batch has the columns {names}, another one {list(part.columns)}; give all batches the same"
            )
    columns = {name: torch.cat([part.columns[name] for part in read]).tolist() for name in names}

    def by_term(values: list[Any]) -> list[Any]:
        return list(chain.from_iterable([value] * len(terms) for value in values))

    return {
        "index": by_term(positions),
        **{name: by_term(values) for name, values in columns.items()},
        "term": terms * len(positions),
        "weight": torch.cat([part.weights for part in read]).flatten().tolist(),
    }


def _writer(path: Path) -> Callable[[dict[str, list[Any]], Path], Any]:
    """The function that writes this kind of file; asked first, so that no weights are computed in vain."""
    if not path.parent.is_dir():
        raise MetaKDError(f"there is no folder {str(path.parent)!r} for the file {path.name!r}; create it first")
    if path.suffix == ".csv":
        return _write_csv
    if path.suffix != ".parquet":
        raise MetaKDError(
            f"the file's ending decides its format, but {path.name!r} has neither .csv nor .parquet; pick one"
        )
    try:
        from pyarrow import parquet, table
    except ImportError as error:
        raise MetaKDError(
            f"Parquet needs pyarrow, which could not be imported ({error}); install it with "
            '`pip install "metakd[export]"`, or write a .csv file'
        ) from error
    return lambda columns, where: parquet.write_table(table(columns), where)


def _write_csv(table: dict[str, list[Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
