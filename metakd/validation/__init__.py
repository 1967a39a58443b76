"""`validate`: what is known about a student, its optimizer and an estimator before the first step."""

from collections.abc import Callable, Iterator

from torch import nn

from metakd.estimators import Estimator
from metakd.inner.groups import Optimizers
from metakd.validation import layers, processes, setup
from metakd.validation.finding import Finding, Subject, by_severity

__all__ = ["Finding", "validate"]

_CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    setup.frozen_parameters,
    setup.lazy_parameters,
    setup.held_parameters,
    setup.learning_rates,
    setup.mirrored_rule,
    processes.sharded_parameters,
    processes.data_parallel_options,
    layers.checkpointing,
    layers.twice_differentiable,
    layers.embeddings,
    layers.batch_norm,
    layers.spectral_norm,
    layers.weight_norm,
    layers.recurrent,
    layers.attention,
    layers.compiled,
    layers.wrappers,
)


def validate(
    student: nn.Module, optimizer: Optimizers | None = None, estimator: Estimator | None = None
) -> list[Finding]:
    """List what is known about a student before its first step, in plain English, with the cure.

    Nothing is run and nothing is changed. So only modules are seen, not what else a forward pass calls.

    Args:
        student: the student, wrappers included.
        optimizer: the student's own optimizer, or several that hold its parameters together; None to leave it out.
        estimator: the estimator of its hypergradients; None for any exact one.

    Returns:
        The findings, errors first; the same finding for several modules is listed once.

    Examples:
        >>> import torch
        >>> student = nn.Sequential(nn.EmbeddingBag(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        >>> for finding in validate(student, torch.optim.SGD(student.parameters(), lr=0.1)):
        ...     print(f"[{finding.level}] {finding}")
        [error] 0 (EmbeddingBag): torch has neither forward mode nor second derivatives for it. Use ...
        [note] 1 (BatchNorm1d): in train mode it raises on a batch with a single value per channel. If ...
    """
    subject = Subject.of(student, optimizer, estimator)
    return by_severity(finding for check in _CHECKS for finding in check(subject))
