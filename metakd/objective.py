"""The balancer's inner and outer loss, as pure functions of the student's and the weight model's parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from metakd.batch import Batch, tensors
from metakd.dual_losses import dual_losses
from metakd.errors import MetaKDError
from metakd.features import Features, evaluate_features
from metakd.precision import as_written, virtual_autocast, widened
from metakd.replay import Product
from metakd.student import FunctionalStudent, Params, Start
from metakd.terms import Term, evaluate


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """(1/B) sum_i sum_k w_ik l_ik of two (B, M) tensors; of dual losses a dual number.

    Example:
        >>> import torch
        >>> weighted_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(11.)
    """
    value, tangent = forward_ad.unpack_dual(losses)
    if tangent is not None and not losses.requires_grad:
        dual: Tensor = forward_ad.make_dual(weighted_mean(weights, value), weighted_mean(weights, tangent))
        return dual
    return (weights * losses).sum() / losses.shape[0]


def checked_losses(terms: Mapping[str, Term], outputs: Any, batch: Batch, where: str, *, finite: bool = True) -> Tensor:
    """All terms' losses (B, M), known to be finite.

    Raises:
        MetaKDError: a term failed, or a loss is NaN or infinite and that was not allowed by `finite=False`.

    Example:
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

    Example:
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

    Example:
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


InnerLoss = Callable[[Params, Params, int], Tensor]


class Objective:
    """Inner and outer loss of one hypergradient: virtual passes of the student over K batches and a meta batch.

    Step t starts with the buffers and generators that step t - 1 left behind, and is repeated identically when it is
    evaluated again. The features of a step are computed when it is first evaluated and constant from then on: the
    weight model's inputs are always detached.

    Args:
        student: the student as a function.
        terms: of the inner loss, by name.
        meta_loss: the term of the outer loss.
        features: what the weight model sees.
        weighting: the weight model.
        batches: one for each inner step, teacher included.
        meta_batch: the batch of the outer loss.
        start: where step 0 starts.
        end: where the meta batch's pass starts, if that is known already (K = 1 after the real forward pass).
        tape: the products of the real forward pass over the first batch.
    """

    def __init__(
        self,
        student: FunctionalStudent,
        terms: Mapping[str, Term],
        meta_loss: Term,
        features: Features,
        weighting: nn.Module,
        batches: Sequence[Batch],
        meta_batch: Batch,
        *,
        start: Start,
        end: Start | None = None,
        tape: Sequence[Product] = (),
    ) -> None:
        self.student, self.weighting, self.features = student, weighting, features
        self.terms, self.meta_terms = terms, {"meta_loss": meta_loss}
        self.batches, self.meta_batch = list(batches), meta_batch
        self._starts = [start] if end is None else [start, end]
        self._tape = tape
        self._autocast = virtual_autocast(student.device_type)
        self._seen: dict[int, Tensor] = {}

    def inner_given_weights(self, params: Params, meta_params: Params, t: int) -> Tensor:
        """The inner loss of step t as a function of the weights (B, M) themselves, `meta_params["weights"]`."""
        return weighted_mean(meta_params["weights"], self._losses(params, t)[1])

    def inner(self, params: Params, meta_params: Params, t: int) -> Tensor:
        """The inner loss of step t as a function of the weight model's parameters."""
        outputs, losses = self._losses(params, t)
        if t not in self._seen:
            features = evaluate_features(self.features, losses, outputs, self.batches[t])
            self._seen[t] = self.student.cast(features)

        def model(*inputs: Any) -> Any:
            return functional_call(self.weighting, meta_params, inputs)

        weights = evaluate_weights(model, self._seen[t], self.batches[t], losses)
        if t == len(self.batches) - 1:
            self.last = losses.detach(), weights.detach()
        return weighted_mean(weights, losses)

    def materialise(self) -> None:
        """Where the weight model has lazy layers, call it once, so that they find out their sizes."""
        if not any(is_lazy(p) for p in self.weighting.parameters()):
            return
        outputs, losses = self._losses(self.student.detached(), 0)
        self.weighting(evaluate_features(self.features, losses, outputs, self.batches[0]), self.batches[0])

    def outer(self, params: Params, meta_params: Params) -> Tensor:
        """The meta loss at `params`, averaged over the meta batch."""
        with self._autocast():
            outputs, _ = self.student.run(params, self.meta_batch.inputs, self._starts[len(self.batches)])
            return checked_losses(self.meta_terms, outputs, self.student.cast(self.meta_batch), "the meta batch").mean()

    def _losses(self, params: Params, t: int) -> tuple[Any, Tensor]:
        batch = self.student.cast(self.batches[t])

        def evaluated(z: Any) -> Tensor:
            with self._autocast():
                return checked_losses(self.terms, z, batch, f"the batch of inner step {t}")

        with self._autocast():
            outputs, end = self.student.run(params, batch.inputs, self._starts[t], self._tape if t == 0 else ())
        losses = dual_losses(evaluated, outputs)
        if len(self._starts) == t + 1:
            self._starts.append(end())
        return outputs, losses
