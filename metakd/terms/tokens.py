"""Terms of language models: losses of tokens, kept or averaged over each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from metakd._basics.sizes import is_integer
from metakd.batch import Batch, as_batch
from metakd.errors import MetaKDError
from metakd.terms.base import Term
from metakd.terms.reading import describe, tensor_in


@dataclass(frozen=True)
class Tokens:
    r"""Any term on classes, applied to every token that counts.

    With the losses $\ell_{it}$ of the term and the tokens $T_i$ of sequence i whose target is not `ignore_index`,

    $$\mathrm{loss}_i = \frac{1}{|T_i|} \sum_{t \in T_i} \ell_{it},$$

    and 0 for a sequence without such a token. So each sequence counts the same, whatever its length. With
    `reduction="token"` the losses $\ell_{it}$ stay apart, and each token has weights of its own: then every batch must
    go through `tokens_as_samples`.

    Shapes: outputs `(B, T, C)` (a tensor or an object with `.logits`), `batch.targets` `(B, T)` integers,
    `batch.teacher` like the outputs; result `(B,)`, or `(N,)` for the N tokens that count.

    Source: the token average is that of `transformers` and of `torch.nn.CrossEntropyLoss(ignore_index=-100)`, which
    average over all tokens of a batch; ours does so within each sequence.

    Args:
        term: applied to `(N, C)` logits and a batch with `(N,)` targets and the teacher's `(N, C)` logits, such as
            `CrossEntropy()` or `SoftTarget()`.
        shift: True if output t is compared with target t + 1, as where Hugging Face's labels are the inputs
            themselves; False if the targets are shifted already.
        reduction: `"sample"` or `"token"`.
        ignore_index: the target of tokens that do not count: padding, a prompt.

    Raises:
        MetaKDError: another `reduction`; in a call, outputs or targets of other shapes, or with `"token"` a batch that
            has not been through `tokens_as_samples`.

    Examples:
        >>> import torch
        >>> from metakd import Batch
        >>> from metakd.terms import CrossEntropy, Tokens
        >>> outputs = torch.tensor([[[4.0, 0.0], [0.0, 0.0], [0.0, 9.0]]])
        >>> batch = Batch(None, targets=torch.tensor([[0, 0, -100]]))
        >>> Tokens(CrossEntropy(), shift=False)(outputs, batch)  # the mean of 0.0181 and 0.6931
        tensor([0.3556])
    """

    term: Term
    shift: bool
    reduction: Literal["sample", "token"] = "sample"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.reduction not in ("sample", "token"):
            raise MetaKDError(f'reduction is {self.reduction!r}, but must be "sample" or "token"')

    @property
    def uses_teacher(self) -> bool:
        """Whether the term may need the teacher."""
        return bool(getattr(self.term, "uses_teacher", True))

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the loss of each sequence, `(B,)`, or of each token, `(N,)`."""
        z = tensor_in(outputs)
        if z is None or z.ndim != 3 or not z.is_floating_point():
            raise MetaKDError(
                f"expected logits of tokens, (B, T, C), as a floating tensor or as an object's .logits, got "
                f"{describe(outputs)}; without a dimension of tokens use {type(self.term).__name__} itself"
            )
        targets = _targets(batch)
        if targets.shape != z.shape[:2]:
            raise MetaKDError(
                f"batch.targets have shape {tuple(targets.shape)}, but the outputs {tuple(z.shape)}; give one target "
                "for each token, and shift=True if they are the input's own tokens"
            )
        counts = _counting(targets, self.shift, self.ignore_index)
        teacher = [self._chosen(one, z, counts) for one in _teachers(batch)]
        flat = Batch(
            None,
            self._from(targets, 1)[counts],
            teacher if isinstance(batch.teacher, list | tuple) else next(iter(teacher), None),
        )
        losses = self.term(self._from(z, 0)[counts], flat)
        if self.reduction == "token":
            if batch.size != len(losses):
                raise MetaKDError(
                    f'reduction="token" makes each of the {len(losses)} tokens that count a sample, but the batch has '
                    f"size={batch.size}; give the balancer batch_fn=lambda item: tokens_as_samples(item, "
                    f"shift={self.shift}), or call it on each Batch of the loader"
                )
            return losses
        sums = losses.new_zeros(len(z)).index_add(0, counts.nonzero()[:, 0], losses)
        return sums / counts.sum(1).clamp(min=1)

    def _from(self, values: Tensor, first: int) -> Tensor:
        """The positions from `first` on, one less than all of them if targets are shifted."""
        return values[:, first : values.shape[1] - 1 + first] if self.shift else values

    def _chosen(self, teacher: Any, z: Tensor, counts: Tensor) -> Any:
        found = tensor_in(teacher)
        if found is None or found.shape[:2] != z.shape[:2]:
            raise MetaKDError(
                f"the teacher's outputs are {describe(teacher)}, the student's (B, T, C) = {tuple(z.shape)}; both must "
                "score the same tokens"
            )
        return self._from(found, 0)[counts]


def tokens_as_samples(batch: Any, *, shift: bool, ignore_index: int = -100) -> Batch:
    """Make each token that counts a sample of its own, for terms `Tokens(..., reduction="token")`.

    Each token has its sequence's `index` and columns, so that tables by source or by sequence give weights to all its
    tokens. Features and weights have N rows, the tokens in the order of `targets[targets != ignore_index]`.

    Args:
        batch: a `Batch` or a loader's item, with `(B, T)` targets.
        shift: as in the terms.
        ignore_index: as in the terms.

    Returns:
        The batch, with `size=N`, and `index` and columns of N entries.

    Raises:
        MetaKDError: targets are missing or not `(B, T)` integers, or no token counts.

    Examples:
        >>> import torch
        >>> targets, source = torch.tensor([[5, 6, 7], [8, -100, -100]]), torch.tensor([0, 1])
        >>> batch = Batch(torch.zeros(2, 3), targets, columns={"source": source})
        >>> found = tokens_as_samples(batch, shift=False)
        >>> found.size, found.columns["source"]
        (4, tensor([0, 0, 0, 1]))
    """
    read = as_batch(batch)
    rows = _counting(_targets(read), shift, ignore_index).nonzero()[:, 0]
    if not len(rows):
        raise MetaKDError(f"no token of the batch counts: all targets are {ignore_index}; drop such batches")

    def by_token(values: Tensor) -> Tensor:
        return values[rows.to(values.device)]

    return read._replace(
        size=len(rows),
        index=None if read.index is None else by_token(read.index),
        columns=None if read.columns is None else {name: by_token(values) for name, values in read.columns.items()},
    )


def _targets(batch: Batch) -> Tensor:
    targets = batch.targets
    if not isinstance(targets, Tensor) or targets.ndim != 2 or not is_integer(targets):
        raise MetaKDError(
            f"batch.targets must be the token targets, integers of shape (B, T), got {describe(targets)}; pass the "
            "labels as Batch(targets=...)"
        )
    return targets


def _counting(targets: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """Which targets count, (B, T), or (B, T - 1) without the first ones if they are shifted."""
    return (targets[:, 1:] if shift else targets) != ignore_index


def _teachers(batch: Batch) -> list[Any]:
    if batch.teacher is None:
        return []
    return list(batch.teacher) if isinstance(batch.teacher, list | tuple) else [batch.teacher]
