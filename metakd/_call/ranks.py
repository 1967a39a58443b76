"""Several processes that train one student: they agree on each station of a call, and average."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metakd._autodiff import Gradients
from metakd._virtual.functional import FunctionalStudent, data_parallel, unwrap
from metakd._virtual.sharded import ShardedStudent
from metakd._virtual.shards import fsdp_modules, is_a, settle
from metakd.errors import MetaKDError
from metakd.estimators.problem import Mean, Norm, unchanged, whole
from metakd.inner import Params

_LENGTH = 256  # bytes of a rank's message


class Ranks:
    r"""The processes that train one student, by `DistributedDataParallel` or `fully_shard`; else this process alone.

    The R ranks solve one problem, whose inner and outer loss are means over the ranks. So every gradient is a mean,
    too:

    $$\nabla_\theta\, \mathrm{inner} = \frac{1}{R} \sum_{r=1}^{R} \nabla_\theta\, \mathrm{inner}_r.$$

    With equal batch sizes it is the problem of one process on the joined batch, except that BatchNorm relates samples
    of its own rank only.

    No rank waits in vain: before each collective operation the ranks exchange a message of fixed size that says where
    they are, or which error they raised inside `together()`. If messages differ, all ranks raise.

    Attributes:
        several: whether the student is shared by several processes, even if there is only one.
        mean: averages the values of all ranks.
    """

    def __init__(self, student: nn.Module) -> None:
        self._wrapper, mesh = data_parallel(student), shared_mesh(student)
        self._reported = False
        self.several = self._wrapper is not None or mesh is not None
        self.mean: Mean = self._mean if self.several else unchanged
        if self.several:
            self._group = mesh.get_group(0) if self._wrapper is None else self._wrapper.process_group
            self._device = _device(mesh) if self._wrapper is None else next(self._wrapper.parameters()).device
            self._names = dist.get_process_group_ranks(self._group)
            self._rank, self._size = dist.get_rank(self._group), len(self._names)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which an exception is reported to waiting ranks; an interruption (Ctrl-C) is not."""
        self._reported = not self.several
        try:
            yield
        except Exception as error:
            if not self._reported:
                with suppress(MetaKDError):  # the rank's own error is more helpful
                    self._exchange(f"raised {type(error).__name__}: {error}")
            raise

    def agree(self, where: str) -> None:
        """Wait until all ranks are at `where`, the same words on all of them.

        Raises:
            MetaKDError: a rank raised an exception, is elsewhere, or cannot be reached.
        """
        if not self.several:
            return
        if self._wrapper is not None and self._wrapper._join_config.enable:
            self._reported = True
            raise MetaKDError(
                "DistributedDataParallel.join() keeps ranks waiting, but the balancer needs them; leave it out and "
                "give all ranks the same number of batches (DistributedSampler does)"
            )
        said = self._exchange(f"is at {where}")
        if len(set(said)) == 1:
            return
        self._reported = True
        failed = [r for r, text in enumerate(said) if text.startswith("raised ")]
        shown = failed or [said.index(text) for text in dict.fromkeys(said)]
        what = "; ".join(f"rank {self._names[r]} {said[r]}" for r in shown[:4])
        cure = (
            "this rank has undone the call as well. Mend what that rank's own error names"
            if failed
            else "all ranks must make the same calls: as many batches, a meta batch on all or on none, and one set of "
            "options, checkpoint and weight model"
        )
        raise MetaKDError(f"{what}. Here, on rank {self._names[self._rank]}: {cure}")

    def mean_of(self, student: FunctionalStudent) -> Mean:
        """`mean` for the gradients of a student; those of a sharded student's parts are means already."""
        if not isinstance(student, ShardedStudent):
            return self.mean
        parts = student.trainable()

        def mean(values: Gradients, like: Params, what: str) -> Gradients:
            own = {name: values.get(name) for name in like if name in parts}
            others = {name: p for name, p in like.items() if name not in parts}
            return own | self._mean(values, others, what) if others else own

        return mean

    def norm_of(self, student: FunctionalStudent) -> Norm:
        """Joins the norms of a sharded student's parts; of other students every rank has the whole."""
        return self._norm if isinstance(student, ShardedStudent) else whole

    def any_of(self, student: FunctionalStudent, here: bool) -> bool:
        """Whether something is so on any rank of a sharded student, whose passes all ranks run together."""
        if not isinstance(student, ShardedStudent):
            return here
        return bool(self.joined(torch.tensor([float(here)]), "whether a proof is due")[0].any())

    def _norm(self, of_part: Tensor, what: str) -> Tensor:
        rows, _ = self.joined(of_part.detach().reshape(1), what)
        norm: Tensor = torch.linalg.vector_norm(rows)
        return norm

    def joined(self, rows: Tensor, what: str) -> tuple[Tensor, slice]:
        """The rows of all ranks in order, and the slice of this rank's own.

        Raises:
            MetaKDError: see `agree`; also if ranks have different numbers of rows.
        """
        if not self.several:
            return rows, slice(None)
        board = torch.zeros(self._size, *rows.shape, dtype=rows.dtype, device=self._device)
        board[self._rank] = rows
        self.agree(f"{what} of shape {tuple(rows.shape)}")
        self._sum(board)
        first = self._rank * rows.shape[0]
        return board.flatten(0, 1).to(rows.device), slice(first, first + rows.shape[0])

    @torch.no_grad()
    def share(self, values: Sequence[Tensor]) -> None:
        """Copy rank 0's values of the weight model, or of terms' parameters, to all ranks.

        Raises:
            MetaKDError: see `agree`; also if they differ in size.
        """
        if not self.several or not values:
            return
        self.agree(f"a weight model of {sum(value.numel() for value in values)} numbers in {len(values)} tensors")
        for value in values:
            received = value.detach().to(self._device).contiguous()
            dist.broadcast(received, self._names[0], self._group)
            value.detach().copy_(received)

    @torch.no_grad()
    def _mean(self, values: Gradients, like: Params, what: str) -> Gradients:
        """The mean over the ranks for the names in `like`; None if it is None on all ranks."""
        dtype = reduce(torch.promote_types, (p.dtype for p in like.values()), torch.float32)
        found = {name: g for name in like if (g := values.get(name)) is not None}
        parts = [found[name].to_dense() if name in found else torch.zeros_like(p) for name, p in like.items()]
        parts.append(torch.tensor([float(name in found) for name in like]))
        flat = torch.cat([part.detach().to(self._device, dtype).flatten() for part in parts])
        self.agree(f"{what}: the mean of {flat.numel()} numbers")
        self._sum(flat)
        *means, present = (flat / self._size).split([part.numel() for part in parts])
        return {
            name: mean.view(p.shape).to(p.device, p.dtype) if some else None
            for (name, p), mean, some in zip(like.items(), means, present.tolist(), strict=True)
        }

    def _exchange(self, text: str) -> list[str]:
        """Tell all ranks a text; return every rank's text."""
        own = bytearray(text.encode()[:_LENGTH])
        board = torch.zeros(self._size, _LENGTH, dtype=torch.uint8)
        board[self._rank, : len(own)] = torch.frombuffer(own, dtype=torch.uint8)
        board = board.to(self._device)
        self._sum(board)
        if bool((board == board[0]).all()):
            return [text] * self._size
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in board.tolist()]

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor, group=self._group)
        except RuntimeError as error:
            self._reported = True
            raise MetaKDError(
                f"rank {self._names[self._rank]} cannot reach the others ({str(error).splitlines()[0][:160]}); look "
                "for an error of another rank, or a loader that ended earlier: give all ranks as many batches"
            ) from error


def shared_mesh(student: nn.Module) -> Any:
    """The mesh of the processes that `fully_shard` spreads the student's parameters over, or None."""
    bare = unwrap(student)
    if not fsdp_modules(bare):
        return None
    settle(bare)
    shards: list[Any] = [p for p in bare.parameters() if is_a(p, "DTensor")]
    return shards[0].device_mesh if shards else None


def _device(mesh: Any) -> torch.device:
    """The device on which this process communicates."""
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def checksum(values: Iterable[Tensor]) -> float:
    """The sum of all numbers: equal models have equal sums."""
    sums = [value.detach().double().sum() for value in values]
    return float(torch.stack([value.to(sums[0].device) for value in sums]).sum()) if sums else 0.0
