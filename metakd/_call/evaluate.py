"""What terms and weight models answer, known to be finite and to fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from metakd._virtual.precision import as_written, widened
from metakd.batch import Batch, tensors
from metakd.errors import MetaKDError
from metakd.terms import Term, evaluate


def checked_losses(terms: Mapping[str, Term], outputs: Any, batch: Batch, where: str, *, finite: bool = True) -> Tensor:
    """All terms' losses (B, M), known to be finite.

    Raises:
        MetaKDError: a term failed, or a loss is NaN or infinite and that was not allowed by `finite=False`.

    Examples:
        >>> import torch
        >>> checked_losses({"half": lambda z, batch: z / 2}, torch.ones(2), Batch(torch.ones(2)), "the batch")
        tensor([[0.5000],
                [0.5000]])
    """
    losses = widened(evaluate(terms, outputs, batch))
    if finite and (broken := not_finite(losses, list(terms), where)):
        raise MetaKDError(f"{broken}; {_cause(outputs, batch)}")
    return losses


def not_finite(losses: Tensor, names: Sequence[str], where: str) -> str | None:
    """Which of the losses (B, M) is NaN or infinite, in words; None where all are finite.

    Examples:
        >>> import torch
        >>> not_finite(torch.tensor([[1.0, torch.inf]]), ["hard", "soft"], "the batch")
        "term 'soft' is inf for sample 0 of the batch (1 of 2 losses are not finite)"
    """
    finite = losses.detach().isfinite()
    if bool(finite.all()):
        return None
    row, column = (~finite).nonzero()[0].tolist()
    value = losses[row, column].item()
    count = f"{int((~finite).sum())} of {losses.numel()} losses are not finite"
    return f"term {names[column]!r} is {value} for sample {row} of {where} ({count})"


def _cause(outputs: Any, batch: Batch) -> str:
    """Where NaN or infinity in a loss comes from."""
    for values, what, cure in (
        (batch.inputs, "the batch's inputs hold", "look at the data"),
        (batch.teacher, "the teacher's outputs hold", "look at the teacher"),
        (outputs, "the student's outputs hold", "lower the learning rate, or look at its parameters"),
    ):
        for t in tensors(values):
            if rows := (~t.detach().isfinite()).nonzero()[:, :1].unique().tolist():
                return f"{what} such values in samples {rows[:5]}: {cure}"
    return "inputs and outputs are finite: look at the term (a logarithm or a root of zero, a division)"


def evaluate_weights(model: Callable[[Tensor, Batch], Any], features: Tensor, batch: Batch, losses: Tensor) -> Tensor:
    """The weight model's answer, known to be finite and shaped like the losses.

    Raises:
        MetaKDError: it is not, or the model raised (chained).

    Examples:
        >>> import torch
        >>> losses = torch.zeros(2, 1)
        >>> evaluate_weights(lambda features, batch: 1 + features, losses, Batch(None), losses)
        tensor([[1.],
                [1.]])
    """
    try:
        with as_written(features.device.type):
            weights = model(features, batch)
    except MetaKDError:
        raise
    except Exception as error:
        raise MetaKDError(
            f"the weight model raised {type(error).__name__}: {error}; it is called as weighting(features, batch) with "
            f"features {tuple(features.shape)} in {features.dtype} on {features.device} and returns (B, M): move or "
            "cast it to where the student is (balancer.to), or fit it to the features"
        ) from error
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise MetaKDError(
            f"the weight model returned {got}, expected (B, M) = {tuple(losses.shape)}: one weight for each sample and "
            "term"
        )
    if not bool(weights.detach().isfinite().all()):
        raise MetaKDError(
            "the weight model returned NaN or infinite weights; lower its learning rate, or bound its features or its "
            "output"
        )
    return weights
