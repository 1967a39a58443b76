"""The balancer's inner and outer loss, as pure functions of the student's and the weight model's parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from metakd.batch import Batch
from metakd.checked import checked_losses, evaluate_weights
from metakd.derivatives import Params
from metakd.dual_losses import dual_losses
from metakd.features import Features, evaluate_features
from metakd.precision import virtual_autocast
from metakd.replay import Product
from metakd.student import FunctionalStudent, Start
from metakd.terms import Term


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """(1/B) sum_i sum_k w_ik l_ik of two (B, M) tensors; of dual losses a dual number.

    Examples:
        >>> import torch
        >>> weighted_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(11.)
    """
    value, tangent = forward_ad.unpack_dual(losses)
    if tangent is not None and not losses.requires_grad:
        dual: Tensor = forward_ad.make_dual(weighted_mean(weights, value), weighted_mean(weights, tangent))
        return dual
    return (weights * losses).sum() / losses.shape[0]


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
