"""The balancer's inner and outer loss as pure functions of the student's and the weight model's parameters."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._autodiff import Params
from metakd._basics.checks import implied
from metakd._call.evaluate import checked_losses, evaluate_weights
from metakd._call.learned_terms import LearnedTerms
from metakd._call.lending import Lending
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.precision import virtual_autocast
from metakd._virtual.swapping import with_parameters
from metakd.batch import Batch
from metakd.estimators.problem import Step, WeightedLosses
from metakd.terms import Term
from metakd.weighting.features import Features, evaluate_features


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """(1/B) sum_i sum_k w_ik l_ik of two (B, M) tensors."""
    # Divided first, because the weights are constants in most derivatives.
    return total(weights / losses.shape[0], losses, weights)


def total(shares: Tensor, losses: Tensor, *weights: Tensor) -> Tensor:
    """Sum_i sum_k shares_ik l_ik; finite only if the losses and the weights that the shares come from are."""
    loss = (shares * losses).sum()
    implied(loss, losses, *weights)
    return loss


class Objective:
    """Inner and outer loss of one hypergradient: virtual passes over K batches and a meta batch.

    Step t starts with the buffers, attributes and generators that step t - 1 left, also when it is evaluated again. A
    step's features are computed at its first evaluation and constant from then on: the weight model's inputs are
    detached.

    Args:
        student: the student as a function.
        terms: the inner loss, by name.
        meta_loss: the term of the outer loss.
        features: the weight model's inputs; None if the weights are given.
        weighting: the weight model.
        learned: the terms' own meta-parameters.
        batches: one per inner step, with the teacher's outputs.
        meta_batch: the batch of the outer loss.
        lending: gives each pass its batch.
        start: the start of step 0.
        end: the start of the meta batch's pass, if the real forward pass has already led there (K = 1).
    """

    def __init__(
        self,
        student: FunctionalStudent,
        terms: Mapping[str, Term],
        meta_loss: Term,
        features: Features | None,
        weighting: nn.Module,
        learned: LearnedTerms,
        batches: Sequence[Batch],
        meta_batch: Batch,
        lending: Lending,
        *,
        start: Start,
        end: Start | None = None,
    ) -> None:
        self.student, self.weighting, self.features, self.learned = student, weighting, features, learned
        self.terms, self.meta_terms = terms, {"meta_loss": meta_loss}
        self.steps, self.meta_batch, self.lending = Step.all_of(batches), meta_batch, lending
        self._starts = [start] if end is None else [start, end]
        self._autocast = virtual_autocast(student.device_type)
        self._seen: dict[int, Tensor] = {}
        self._latest: dict[int, Tensor] = {}

    def opening(self) -> "Objective":
        """A fresh objective from the same start, with at most the first two inner steps."""
        meta_loss, batches = self.meta_terms["meta_loss"], [step.batch for step in self.steps[:2]]
        parts = self.student, self.terms, meta_loss, None, self.weighting, self.learned
        return Objective(*parts, batches, self.meta_batch, self.lending, start=self._starts[0])

    def weighted(self) -> WeightedLosses:
        """The inner losses, weighted by the weight model."""
        return WeightedLosses(self.losses, self.weights, list(self.terms), learned=list(self.learned.params()))

    def given_weights(self) -> WeightedLosses:
        """The inner losses, weighted by the meta-parameter "weights", (B, M)."""
        return self.weighted()._replace(weights=lambda meta, step: meta["weights"], given="weights")

    def losses(self, params: Params, step: Step, meta_params: Params | None = None, via: Any = None) -> Tensor:
        """The terms' losses (B, M) of an inner step at `params`, and at the terms' own parameters in `meta_params`.

        `via(terms, outputs)` may evaluate the terms in its own way.
        """
        t = step.number

        def evaluated(outputs: Any) -> Tensor:
            terms = partial(checked_losses, self.terms, batch=batch, where=f"the batch of inner step {t}")
            losses = terms(outputs) if via is None else via(terms, outputs)
            if self.features is not None and t not in self._seen:
                features = evaluate_features(self.features, losses, outputs, batch)
                self._seen[t] = self.student.cast(features)
            return losses

        following = len(self._starts) == t + 1
        with self.lending.lend(step.batch) as lent, self._autocast():
            batch = self.student.cast(lent)
            losses, end = self.student.run(
                params,
                batch.inputs,
                self._starts[t],
                evaluated,
                wants_end=following,
                others=self.learned.swaps(meta_params),
            )
        if end is not None:
            self._starts.append(end)
        found: Tensor = losses
        self._latest.setdefault(t, found.detach())
        return found

    def weights(self, meta_params: Params, step: Step) -> Tensor:
        """The weight model's weights (B, M) for a step; `losses` must have evaluated the step before."""
        t = step.number
        with with_parameters(self.weighting, meta_params):
            weights = evaluate_weights(self.weighting, self._seen[t], step.batch, self._latest[t])
        if step is self.steps[-1]:
            self.last = self._latest[t], weights.detach()
        return weights

    def materialise(self) -> None:
        """Run a weight model with lazy layers once, so that they learn their sizes."""
        if any(is_lazy(p) for p in self.weighting.parameters()):
            self.losses(self.student.detached(), self.steps[0])
            self.weighting(self._seen[0], self.steps[0].batch)

    def outer(self, params: Params, meta_params: Params) -> Tensor:
        """The meta loss at `params`, averaged over the meta batch."""
        losses = self.meta_losses(params, meta_params)
        loss = losses.mean()
        implied(loss, losses)
        return loss

    def meta_losses(self, params: Params, meta_params: Params | None = None) -> Tensor:
        """The meta loss of each sample at `params`, (B, 1); it may use a term, with parameters in `meta_params`."""

        def evaluated(outputs: Any) -> Tensor:
            return checked_losses(self.meta_terms, outputs, batch, "the meta batch")

        with self.lending.lend(self.meta_batch) as lent, self._autocast():
            batch = self.student.cast(lent)
            losses: Tensor = self.student.run(
                params,
                batch.inputs,
                self._starts[len(self.steps)],
                evaluated,
                others=self.learned.swaps(meta_params),
            )[0]
        return losses
