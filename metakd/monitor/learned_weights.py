"""The learned weights of given samples, with the features that the weight model saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metakd._virtual.teacher import in_eval_mode
from metakd.batch import Batch
from metakd.errors import MetaKDError

if TYPE_CHECKING:
    from metakd.balancer import BilevelLossBalancer

T = TypeVar("T")


class LearnedWeights(NamedTuple):
    """The weights of a balancer on given samples, on the CPU.

    Attributes:
        balancer: whose weights they are.
        targets: (N,) labels.
        features: (N, F) what the weight model saw; by default the losses of student and teacher, or of the terms.
        weights: (N, M) weights.

    Examples:
        >>> targets, weights = torch.tensor([0, 1, 1]), torch.tensor([[1.0], [2.0], [4.0]])
        >>> found = LearnedWeights(None, targets, torch.zeros(3, 1), weights)
        >>> found.by_class(2)
        tensor([[1.],
                [3.]])
    """

    balancer: BilevelLossBalancer
    targets: Tensor
    features: Tensor
    weights: Tensor

    def by_class(self, classes: int) -> Tensor:
        """(C, M) mean weight of every class; NaN for a class without a sample."""
        sums = self.weights.new_zeros(classes, self.weights.shape[1]).index_add_(0, self.targets, self.weights)
        return sums / torch.bincount(self.targets, minlength=classes).unsqueeze(1)


def learned_weights(balancer: BilevelLossBalancer, batches: Iterable[Any]) -> LearnedWeights:
    """Compute the weights of given samples, with the student in eval mode and without a trace.

    Args:
        balancer: with a weight model that has learned from features.
        batches: labelled samples, as the loader yields them; best without augmentation.

    Returns:
        Targets, features and weights of all samples, on the CPU.

    Raises:
        MetaKDError: there is no batch, or a batch without integer labels (B,).

    Examples:
        >>> from metakd import BilevelLossBalancer, terms
        >>> student = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=optimizer)
        >>> learned = learned_weights(balancer, [(torch.randn(8, 4), torch.arange(8) % 3)] * 2)
        >>> learned.weights.shape, learned.by_class(3).shape
        (torch.Size([16, 1]), torch.Size([3, 1]))
    """

    def labelled(features: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(batch.targets, Tensor) or batch.targets.shape != weights.shape[:1]:
            raise MetaKDError(
                "weights are read by class, so every batch needs labels of shape (B,): pass (inputs, targets)"
            )
        return batch.targets.long().cpu(), features.cpu(), weights.cpu()

    read = answers(balancer, batches, labelled)
    targets, features, weights = (torch.cat(parts) for parts in zip(*read, strict=True))
    return LearnedWeights(balancer, targets, features, weights)


def answers(
    balancer: BilevelLossBalancer, batches: Iterable[Any], keep: Callable[[Tensor, Batch, Tensor], T]
) -> list[T]:
    """What `keep` makes of each batch's features (B, F), batch and weights (B, M), with the student in eval mode."""
    found: list[T] = []
    with in_eval_mode(balancer.student):
        for item in batches:
            with first_answer(balancer.weighting) as seen:
                balancer.weights(item)
            found.append(keep(*seen[0]))
    if not found:
        raise MetaKDError("there is no batch to read weights of; pass the training batches, not an exhausted iterator")
    return found


@contextmanager
def first_answer(weighting: nn.Module) -> Iterator[list[tuple[Tensor, Batch, Tensor]]]:
    """Record the inputs and output of the weight model's first call: features (B, F), batch, weights (B, M)."""
    seen: list[tuple[Tensor, Batch, Tensor]] = []

    def look(model: Any, inputs: tuple[Tensor, Batch], weights: Tensor) -> None:
        if not seen:
            seen.append((*inputs, weights.detach()))

    hook = weighting.register_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
