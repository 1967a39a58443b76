"""Evaluates terms and weight models, and checks that the results are finite and have the right shape."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from metakd._basics.checks import check_finite
from metakd._basics.nest import versions_of
from metakd._virtual.precision import as_written, widened
from metakd.batch import Batch, map_tensors, tensors
from metakd.errors import MetaKDError
from metakd.terms import Term, evaluate


def checked_losses(terms: Mapping[str, Term], outputs: Any, batch: Batch, where: str, *, finite: bool = True) -> Tensor:
    """The losses (B, M) of all terms.

    Raises:
        MetaKDError: a term fails, or with `finite` a loss is NaN or infinite.
    """
    losses = widened(evaluate(terms, outputs, batch))
    # A pass with tangents repeats one whose losses are checked.
    if not finite or forward_ad.unpack_dual(losses).tangent is not None:
        return losses
    known, seen = losses.detach(), map_tensors(Tensor.detach, outputs)  # without graphs, as checks may wait
    read = batch.inputs, batch.teacher
    versions = versions_of(read)

    def say() -> None:
        if broken := not_finite(known, list(terms), where):
            raise MetaKDError(f"{broken}; {_cause(seen, batch) if versions_of(read) == versions else _REFILLED}")

    check_finite(losses, say)
    return losses


def not_finite(losses: Tensor, names: Sequence[str], where: str) -> str | None:
    """A sentence about the first loss (B, M) that is NaN or infinite; None if there is none."""
    finite = losses.detach().isfinite()
    if bool(finite.all()):
        return None
    row, column = (~finite).nonzero()[0].tolist()
    value = losses[row, column].item()
    count = f"{int((~finite).sum())} of {losses.numel()} losses are not finite"
    return f"term {names[column]!r} is {value} for sample {row} of {where} ({count})"


_REFILLED = "the batch was written to before this was read: call once with defer_checks=False to find the cause"


def _cause(outputs: Any, batch: Batch) -> str:
    """The source of NaN or infinity in a loss, and its cure."""
    step = "if the losses before the step were finite, their gradient is not: look for a root or a norm of zero"
    for values, what, cure in (
        (batch.inputs, "its inputs hold", "look at the data"),
        (batch.teacher, "the teacher's outputs hold", "look at the teacher"),
        (outputs, "the student's outputs hold", f"lower the learning rate, or look at its parameters; {step}"),
    ):
        for t in tensors(values):
            if rows := (~t.detach().isfinite()).nonzero()[:, :1].unique().tolist():
                return f"{what} such values in samples {rows[:5]}: {cure}"
    return "inputs and outputs are finite: look at the term (a logarithm or a root of zero, a division)"


def evaluate_weights(model: Callable[[Tensor, Batch], Any], features: Tensor, batch: Batch, losses: Tensor) -> Tensor:
    """The weight model's weights (B, M).

    Raises:
        MetaKDError: the model raises an error (chained), or its answer is not finite or has another shape than the
        losses.
    """
    try:
        with as_written(features.device.type):
            weights = model(features, batch)
    except MetaKDError:
        raise
    except Exception as error:
        raise MetaKDError(
            f"the weight model raised {type(error).__name__}: {error}; it is called as weighting(features, batch) with "
            f"features {tuple(features.shape)} in {features.dtype} on {features.device} and returns (B, M); move or "
            "cast it as the student (balancer.to), or fit it to the features"
        ) from error
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise MetaKDError(
            f"the weight model returned {got}, expected (B, M) = {tuple(losses.shape)}: one weight for each sample and "
            "term"
        )
    check_finite(weights, partial(_weights_not_finite, weights.detach()))
    return weights


def _weights_not_finite(weights: Tensor) -> None:
    if not bool(weights.isfinite().all()):
        raise MetaKDError(
            "the weight model returned NaN or infinite weights; lower its learning rate, or bound its features or its "
            "output"
        )
