"""`BilevelLossBalancer`: the object a user wraps around an existing training loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd import checkpoint
from metakd.batch import Batch, as_batch, batch_size
from metakd.errors import MetaKDError
from metakd.estimators import Estimator, OneStep, Problem
from metakd.features import Features, evaluate_features, own_losses, student_and_teacher
from metakd.inner import GradientTransformation, InnerOptimizer, mirror, plain_sgd, repaired
from metakd.objective import Objective, checked_losses, checked_weights, weighted_mean
from metakd.report import Report
from metakd.student import FunctionalStudent, Start, call
from metakd.terms import CrossEntropy, Term, named
from metakd.train_pass import TrainPass
from metakd.transaction import Snapshot, all_or_nothing
from metakd.weighting import LossMLP
from metakd.weighting_step import WeightingStep


class BilevelLossBalancer:
    r"""Learns how much each loss term counts for each sample, by exact hypergradients of a meta loss.

    $$\min_\phi L_\mathrm{meta}(\theta_K(\phi)), \qquad \theta_{t+1} = \theta_t + \mathrm{update}\Big(\nabla_\theta
      \frac{1}{B} \sum_{i=1}^{B} \sum_{k=1}^{M} w_{ik}(\phi)\, \ell_{ik}(\theta_t)\Big)$$

    A call takes a training batch and a meta batch: it runs the training forward pass, looks one optimizer step ahead,
    takes the gradient of the meta loss there in the weight model's parameters, steps the weight model, and returns the
    weighted loss of the training batch for the user's own `loss.backward()` and `optimizer.step()`. Afterwards the student
    is what that one forward pass alone would have made of it.

    Source: BiKD (PAKDD 2026, arXiv 2605.17839), whose defaults these are; Meta-Weight-Net (Shu et al., 2019) and Learning to
    Reweight (Ren et al., 2018) are the same computation with another weight model. Ours differs in computing it without a copy
    of the student and without a second-order graph, in running the teacher in eval mode, and in taking any module, optimizer
    and term.

    Args:
        student: any module, unchanged.
        terms: per-sample losses: a mapping name -> term, or a sequence of terms. A term is any callable (outputs, batch) -> (B,).
        optimizer: the student's own torch optimizer; its learning rates, groups and state are read at every step.
        weighting: the weight model, an `nn.Module` (features (B, F), batch) -> (B, M); default `weighting.LossMLP`.
        weighting_optimizer: of the weight model; default `torch.optim.Adam(lr=1e-3, weight_decay=1e-4)`.
        teacher: run once a batch, in eval mode, without gradients; or None.
        features: (losses (B, M), outputs, batch) -> (B, F), what the weight model sees, always detached. Default: with a teacher
            the cross-entropies of student and teacher on the label, without one the losses.
        meta_loss: a term, averaged over the meta batch; default `terms.CrossEntropy()`.
        inner: the lookahead's optimizer: `"sgd"` is plain SGD at the optimizer's current learning rates (the paper),
            `"mirror"` the optimizer's own rule and state, or a torchopt `GradientTransformation`.
        estimator: how the hypergradient is computed.
        accumulate: hypergradients averaged before each step of the weight model (the paper's k).
        every: take a hypergradient on every n-th call only (calls n, 2n, ...).
        batch_fn: loader item -> `Batch`; the default takes (x, y), (x, y, index), a mapping or a `Batch`.

    Raises:
        MetaKDError: whatever does not fit, with cause and cure. After any error student, optimizer and weight model are bit
            for bit what they were.

    Example:
        >>> from metakd.terms import CrossEntropy, SoftTarget
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> balancer = BilevelLossBalancer(student, {"hard": CrossEntropy(), "soft": SoftTarget()},
        ...                                optimizer=optimizer, teacher=teacher)
        >>> batch, meta_batch = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> loss = balancer(batch, meta_batch)
        >>> optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> balancer.report.influence.shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Mapping[str, Term] | Sequence[Term],
        *,
        optimizer: torch.optim.Optimizer,
        weighting: nn.Module | None = None,
        weighting_optimizer: torch.optim.Optimizer | None = None,
        teacher: nn.Module | None = None,
        features: Features | None = None,
        meta_loss: Term | None = None,
        inner: str | GradientTransformation = "sgd",
        estimator: Estimator = OneStep(),  # noqa: B008 (frozen)
        accumulate: int = 1,
        every: int = 1,
        batch_fn: Callable[[Any], Batch] | None = None,
    ) -> None:
        self.student, self.optimizer, self.teacher = student, optimizer, teacher
        self.terms = named(terms)
        self.meta_loss = CrossEntropy() if meta_loss is None else meta_loss
        self.features = features or (own_losses if teacher is None else student_and_teacher)
        self.estimator, self.inner = estimator, inner
        self.accumulate, self.every = _positive(accumulate, "accumulate"), _positive(every, "every")
        self._batch_fn = batch_fn or as_batch
        self._functional = FunctionalStudent(student)
        self._memory: dict[str, Any] = {}
        self._report: Report | None = None
        self._calls = 0
        self._check_parts()
        if weighting is None:
            if weighting_optimizer is not None:
                raise MetaKDError("weighting_optimizer was given without weighting; pass the weight model it belongs to as well")
            width = None if features is not None else 2 if teacher is not None else len(self.terms)
            weighting = self._default_weighting(width)
        self.weighting = weighting
        self._step = WeightingStep(weighting, weighting_optimizer, self.accumulate)

    @property
    def weighting_optimizer(self) -> torch.optim.Optimizer | None:
        """The weight model's optimizer; None for a weight model without parameters."""
        return self._step.optimizer

    @property
    def report(self) -> Report:
        """The last step: losses, weights, influence, meta loss and hypergradient norm, detached."""
        if self._report is None:
            raise MetaKDError("there is no report yet; call the balancer on a batch first")
        return self._report

    def __call__(self, batch: Any, meta_batch: Any) -> Tensor:
        """Take the hypergradient, step the weight model, return the weighted loss with the student's graph.

        Args:
            batch: a training batch, as the loader yields it.
            meta_batch: a batch of the meta set; None to take no hypergradient in this call.

        Returns:
            The scalar (1/B) sum_ik w_ik l_ik; the caller runs `.backward()` and `optimizer.step()`.

        Raises:
            MetaKDError: see the class.
        """
        with self._all_or_nothing() as snapshot:
            batch = self._batch(batch, "the batch")
            meta = None if meta_batch is None else self._batch(meta_batch, "the meta batch", self.meta_loss)
            start = self._functional.start()
            train = TrainPass(self.student, self._functional, batch)
            losses = checked_losses(self.terms, train.outputs, batch, "the batch")
            with self._functional.untouched():
                features = evaluate_features(self.features, losses, train.outputs, batch)
                calls = self._calls + 1
                if meta is None or calls % self.every:
                    weights = checked_weights(self.weighting(features, batch), losses).detach()
                    loss, report = weighted_mean(weights, losses), Report(losses.detach(), weights)
                else:
                    loss, report = self._learn(snapshot, train, batch, meta, losses, features, start)
            self._report, self._calls = report, calls
            return loss

    def loss(self, batch: Any) -> Tensor:
        """The weighted loss alone, with the weights as they are; nothing is learned."""
        return self(batch, None)

    def weights(self, batch: Any) -> Tensor:
        """The weights of a batch's samples as they are now, (B, M), detached; leaves no trace."""
        with self._all_or_nothing(), self._functional.untouched(), torch.no_grad():
            converted = self._batch(batch, "the batch")
            outputs, _ = self._functional.run(self._functional.detached(), converted.inputs, self._functional.start())
            losses = checked_losses(self.terms, outputs, converted, "the batch")
            features = evaluate_features(self.features, losses, outputs, converted)
            return checked_weights(self.weighting(features, converted), losses)

    def meta_step(self, batches: Sequence[Any], meta_batch: Any) -> Report:
        """One hypergradient through K = len(batches) virtual inner steps, then one step of the weight model.

        The student stays where it is: the user then takes real steps with `balancer.loss(batch)`. With
        `accumulate` > 1 the weight model steps after that many hypergradients, as in a call.

        Args:
            batches: the training batches of the K inner steps, in order.
            meta_batch: the batch of the meta loss after them.

        Returns:
            The report; its losses and weights are those of the last inner step.

        Raises:
            MetaKDError: see the class; also an estimator that cannot take K steps.
        """
        with self._all_or_nothing() as snapshot, self._functional.untouched(), torch.enable_grad():
            problem, objective = self._problem_in_phi(batches, meta_batch)
            result = self.estimator(problem)
            norm = self._step.take(result.gradient, snapshot.keep_optimizer)
            losses, weights = objective.last
            self._report = Report(losses, weights, None, result.outer_loss, norm)
            return self._report

    def state_dict(self) -> dict[str, Any]:
        """Everything the balancer knows, as plain tensors and numbers; loads with `weights_only=True`."""
        return {**self._step.state_dict(), "calls": self._calls, "terms": list(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken, to the same numbers.

        Raises:
            MetaKDError: the state is of another kind of balancer; the message names what differs, and nothing changes.
        """
        checkpoint.check(state, self.state_dict(), "the balancer")
        with self._all_or_nothing() as snapshot:
            snapshot.keep_optimizer()
            self._step.load_state_dict(state)
            self._calls = int(state["calls"])

    def _problem_in_phi(self, batches: Sequence[Any], meta_batch: Any, dtype: torch.dtype | None = None) -> tuple[Problem, Objective]:
        """The bilevel problem in the weight model's parameters, through K inner steps."""
        if not len(batches):
            raise MetaKDError("there are no batches; their number is the number of inner steps, so give at least one")
        if not self._step.params():
            raise MetaKDError(
                f"{type(self.weighting).__name__} has no trainable parameters, so no hypergradient can be taken in them; "
                "call the balancer itself, one batch at a time"
            )
        student = FunctionalStudent(self.student, dtype)
        converted = [self._batch(batch, f"batch {t}") for t, batch in enumerate(batches)]
        meta = self._batch(meta_batch, "the meta batch", self.meta_loss)
        objective = Objective(student, self.terms, self.meta_loss, self.features, self.weighting, converted, meta)
        if any(is_lazy(p) for p in self.weighting.parameters()):
            objective.materialise()
        phi = {name: student.cast(p.detach()) for name, p in self._step.params().items()}
        return self._problem(objective, objective.inner, phi), objective

    @contextmanager
    def float64_problem(self, batches: Sequence[Any], meta_batch: Any) -> Iterator[Problem]:
        """The same problem in float64, inside a block that leaves no trace."""
        with self._all_or_nothing(), self._functional.untouched(), torch.enable_grad():
            yield self._problem_in_phi(batches, meta_batch, torch.float64)[0]

    def _problem(self, objective: Objective, inner: Any, phi: dict[str, Tensor], first: Any = None) -> Problem:
        student = objective.student
        optimizer = self._inner_optimizer()
        steps = range(len(objective.batches))
        state = student.cast(optimizer.state)
        return Problem(inner, objective.outer, student.detached(), phi, steps, optimizer.transformation, state, first, self._memory)

    def _learn(
        self, snapshot: Snapshot, train: TrainPass, batch: Batch, meta: Batch, losses: Tensor, features: Tensor, start: Start
    ) -> tuple[Tensor, Report]:
        """Hypergradient and step of the weight model; the loss under the weights that come out."""
        answers_influence = hasattr(self.weighting, "from_influence")
        moves = answers_influence or self._step.moves_next
        answer = self.weighting.lookahead_weights if answers_influence else self.weighting
        weights = checked_weights(answer(features, batch), losses)
        inner_loss = weighted_mean(weights.detach(), losses)
        objective = Objective(
            self._functional, self.terms, self.meta_loss, self.features, self.weighting, [batch], meta, start=start, end=self._functional.start()
        )
        problem = self._problem(
            objective, objective.inner_given_weights, {"weights": weights.detach()}, lambda: train.gradient(inner_loss, keep_graph=moves)
        )
        result = self.estimator(problem)
        influence = result.gradient["weights"] * losses.shape[0]
        if answers_influence:
            norm, weights = influence.norm(), checked_weights(self.weighting.from_influence(influence), losses)
        else:
            norm = self._step.take(self._step.pull_back(weights, result.gradient["weights"]), snapshot.keep_optimizer)
            if moves:
                weights = checked_weights(self.weighting(features, batch), losses)
        loss = weighted_mean(weights.detach(), losses) if moves else train.handed_over(inner_loss)
        return loss, Report(losses.detach(), weights.detach(), influence, result.outer_loss, norm)

    def _batch(self, item: Any, what: str, needed_by: Term | None = None) -> Batch:
        """The item as a batch with the teacher's outputs, where anything asks for them."""
        batch = self._batch_fn(item)
        if not isinstance(batch, Batch):
            raise MetaKDError(f"batch_fn must return a metakd.Batch, got {type(batch).__name__}")
        batch_size(batch, what)
        if self.teacher is None or batch.teacher is not None or not getattr(needed_by, "uses_teacher", True):
            return batch
        modes = [(module, module.training) for module in self.teacher.modules()]
        try:
            self.teacher.eval()
            with torch.no_grad(), self._functional.untouched():
                return batch._replace(teacher=call(self.teacher, batch.inputs))
        finally:
            for module, mode in modes:
                module.training = mode

    def _inner_optimizer(self) -> InnerOptimizer:
        params = self._functional.trainable()
        if isinstance(self.inner, GradientTransformation):
            plain_sgd(self.optimizer, params)  # the optimizer must be the student's here too
            transformation = repaired(self.inner)
            return InnerOptimizer(transformation, transformation.init(self._functional.detached()))
        return {"sgd": plain_sgd, "mirror": mirror}[self.inner](self.optimizer, params)

    def _check_parts(self) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise MetaKDError(f"optimizer must be the student's torch optimizer, got {type(self.optimizer).__name__}")
        if not self._functional.trainable():
            raise MetaKDError("the student has no trainable parameter; call student.requires_grad_(True)")
        if isinstance(self.estimator, str | type) or not callable(self.estimator):
            raise MetaKDError(f"estimator must be an object such as estimators.OneStep(), got {self.estimator!r}")
        if not isinstance(self.inner, GradientTransformation) and self.inner not in ("sgd", "mirror"):
            raise MetaKDError(f"inner must be 'sgd', 'mirror' or a torchopt GradientTransformation, got {self.inner!r}")
        self._inner_optimizer()

    def _default_weighting(self, width: int | None) -> nn.Module:
        like = next(iter(self._functional.trainable().values()))
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            return LossMLP(width, len(self.terms)).to(like.device, like.dtype)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Snapshot]:
        snapshot = Snapshot(self._functional.module, self._step)
        with all_or_nothing(snapshot):
            yield snapshot


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise MetaKDError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
