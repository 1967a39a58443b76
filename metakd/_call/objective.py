"""The balancer's inner and outer loss, as pure functions of the student's and the weight model's parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import Params
from metakd._call.evaluate import checked_losses, evaluate_weights
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.precision import virtual_autocast
from metakd._virtual.swapping import with_parameters
from metakd.batch import Batch, as_it_is
from metakd.estimators.problem import Step, WeightedLosses
from metakd.terms import Term
from metakd.weighting.features import Features, evaluate_features


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """(1/B) sum_i sum_k w_ik l_ik of two (B, M) tensors.

    Examples:
        >>> import torch
        >>> weighted_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(11.)
    """
    return (weights * losses).sum() / losses.shape[0]


class Objective:
    """Inner and outer loss of one hypergradient: virtual passes of the student over K batches and a meta batch.

    Step t starts where step t - 1 left buffers, attributes and generators, and is repeated identically when it is
    evaluated again. The features of a step are computed when it is first evaluated and constant from then on: the
    weight model's inputs are always detached.

    Args:
        student: the student as a function.
        terms: of the inner loss, by name.
        meta_loss: the term of the outer loss.
        features: what the weight model sees; None where the weights are given.
        weighting: the weight model.
        batches: one for each inner step, teacher included.
        meta_batch: the batch of the outer loss.
        start: where step 0 starts.
        end: where the meta batch's pass starts, if that is known already (K = 1 after the real forward pass).
    """

    def __init__(
        self,
        student: FunctionalStudent,
        terms: Mapping[str, Term],
        meta_loss: Term,
        features: Features | None,
        weighting: nn.Module,
        batches: Sequence[Batch],
        meta_batch: Batch,
        *,
        start: Start,
        end: Start | None = None,
    ) -> None:
        self.student, self.weighting, self.features = student, weighting, features
        self.terms, self.meta_terms = terms, {"meta_loss": meta_loss}
        self.steps, self.meta_batch = Step.all_of(batches), meta_batch  # each pass takes copies
        self._starts = [start] if end is None else [start, end]
        self._autocast = virtual_autocast(student.device_type)
        self._seen: dict[int, Tensor] = {}
        self._latest: dict[int, Tensor] = {}

    def opening(self) -> "Objective":
        """The same from the same start with two inner steps at most, of which nothing is known yet."""
        meta_loss, batches = self.meta_terms["meta_loss"], [step.batch for step in self.steps[:2]]
        return Objective(
            self.student, self.terms, meta_loss, None, self.weighting, batches, self.meta_batch, start=self._starts[0]
        )

    def weighted(self) -> WeightedLosses:
        """The inner losses, weighted by the weight model with given parameters."""
        return WeightedLosses(self.losses, self.weights, list(self.terms))

    def given_weights(self) -> WeightedLosses:
        """The inner losses, weighted by the meta-parameter "weights" itself, (B, M)."""
        return WeightedLosses(self.losses, lambda meta, step: meta["weights"], list(self.terms))

    def losses(self, params: Params, step: Step) -> Tensor:
        """The terms' losses (B, M) of an inner step at `params`."""
        t, batch = step.number, self.student.cast(as_it_is(step.batch))

        def evaluated(outputs: Any) -> Tensor:
            losses = checked_losses(self.terms, outputs, batch, f"the batch of inner step {t}")
            if self.features is not None and t not in self._seen:
                features = evaluate_features(self.features, losses, outputs, batch)
                self._seen[t] = self.student.cast(features)
            return losses

        following = len(self._starts) == t + 1
        with self._autocast():
            losses, end = self.student.run(params, batch.inputs, self._starts[t], evaluated, wants_end=following)
        if end is not None:
            self._starts.append(end)
        found: Tensor = losses
        self._latest.setdefault(t, found.detach())
        return found

    def weights(self, meta_params: Params, step: Step) -> Tensor:
        """The weight model's weights (B, M) for the batch of a step, whose losses were evaluated before."""
        t = step.number
        with with_parameters(self.weighting, meta_params):
            weights = evaluate_weights(self.weighting, self._seen[t], step.batch, self._latest[t])
        if step is self.steps[-1]:
            self.last = self._latest[t], weights.detach()
        return weights

    def materialise(self) -> None:
        """Where the weight model has lazy layers, call it once, so that they find out their sizes."""
        if any(is_lazy(p) for p in self.weighting.parameters()):
            self.losses(self.student.detached(), self.steps[0])
            self.weighting(self._seen[0], self.steps[0].batch)

    def outer(self, params: Params, meta_params: Params) -> Tensor:
        """The meta loss at `params`, averaged over the meta batch."""
        return self.meta_losses(params).mean()

    def meta_losses(self, params: Params) -> Tensor:
        """The meta loss at `params` of each sample of the meta batch, (B, 1)."""
        batch = self.student.cast(as_it_is(self.meta_batch))

        def evaluated(outputs: Any) -> Tensor:
            return checked_losses(self.meta_terms, outputs, batch, "the meta batch")

        with self._autocast():
            losses: Tensor = self.student.run(params, batch.inputs, self._starts[len(self.steps)], evaluated)[0]
        return losses
