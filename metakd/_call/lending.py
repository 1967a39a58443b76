"""Lends batches to passes: copies, until a proof has seen that passes only read them."""

from collections.abc import Iterator
from contextlib import contextmanager

from metakd._basics.nest import same_values, versions_of
from metakd.batch import Batch, detached_copy, map_tensors, tensors
from metakd.errors import MetaKDError


class Lending:
    """Knows whether passes write to their batches.

    Attributes:
        only_read: whether a proof has seen that no pass writes; passes then get the user's own tensors.
        written: whether any pass has written to its batch.
        compares: whether values are compared, too, as `.data` and NumPy leave versions as they are; for a proof.

    Examples:
        >>> import torch
        >>> lending, batch = Lending(), Batch(torch.zeros(2))
        >>> with lending.lend(batch) as own:
        ...     _ = own.inputs.add_(1)
        >>> batch.inputs, lending.written
        (tensor([0., 0.]), True)
    """

    def __init__(self) -> None:
        self.only_read = self.written = self.compares = False

    @contextmanager
    def lend(self, batch: Batch, *, itself: bool = False) -> Iterator[Batch]:
        """A block with the batch for one pass: a copy, or the batch without its graph if passes only read.

        Args:
            batch: the batch.
            itself: lend the batch itself in any case, as to the training pass.

        Raises:
            MetaKDError: a pass writes to a batch although none has in the proof.
        """
        own = batch if itself else _without_graph(batch) if self.only_read else detached_copy(batch)
        before = versions_of(own)
        yield own
        if before == versions_of(own) and not (self.compares and not itself and _differ(own, batch)):
            return
        self.written = True
        if self.only_read:
            self.only_read = False
            raise MetaKDError(
                "a forward pass wrote to its batch, which no pass did when this balancer was proven, so other passes "
                "of this call may have read changed values. The call is undone, but the batch stays changed: load it "
                "anew. From now on passes get copies"
            )


def _without_graph(batch: Batch) -> Batch:
    if not any(t.requires_grad for t in tensors(batch)):
        return batch
    own: Batch = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), batch)
    return own


def _differ(own: Batch, batch: Batch) -> bool:
    return not all(map(same_values, tensors(own), tensors(batch)))
