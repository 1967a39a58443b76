"""`BilevelLossBalancer`: the object a user wraps around an existing training loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._basics.positive_int import positive_int
from metakd._call.arguments import check_parts, check_teacher, default_weighting, validated
from metakd._call.evaluate import checked_losses, evaluate_weights, not_finite
from metakd._call.objective import Objective, weighted_mean
from metakd._call.ranks import Ranks, checksum
from metakd._call.read import read_batch
from metakd._call.rollback import Snapshot, all_or_nothing
from metakd._call.saved_state import check_balancer_state, loading
from metakd._call.train_pass import TrainPass
from metakd._call.weight_step import WeightingStep
from metakd._proof.proofs import Proofs
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.precision import as_written
from metakd._virtual.teacher import Teacher
from metakd.batch import Batch, as_batch, as_it_is, endless
from metakd.errors import MetaKDError, explained
from metakd.estimators import Estimator, Hypergradient, OneStep, Problem
from metakd.estimators.estimate import estimate
from metakd.estimators.problem import Step, WeightedLosses, unchanged
from metakd.inner import GradientTransformation, Params, inner_optimizer, learning_rate, param_groups
from metakd.inner.groups import Optimizers
from metakd.report import Report
from metakd.terms import CrossEntropy, Term, named
from metakd.weighting.features import Features, evaluate_features, own_losses, student_and_teacher


class BilevelLossBalancer:
    r"""Learns how much each loss term counts for each sample, by exact hypergradients of a meta loss.

    $$\min_\phi\, L_\mathrm{meta}(\theta_K(\phi)), \qquad \theta_{t+1} = \theta_t + \mathrm{update}\Big(\nabla_\theta
      \frac{1}{B} \sum_{i=1}^{B} \sum_{k=1}^{M} w_{ik}(\phi)\, \ell_{ik}(\theta_t)\Big)$$

    with the student's parameters $\theta$, the weight model's $\phi$, and for sample i and term k the loss
    $\ell_{ik}$ and its weight $w_{ik}$. A call has K = 1 inner step, `meta_step` any number.

    A call takes a training batch and a meta batch: it runs the training forward pass, looks one optimizer step
    ahead, takes the gradient of the meta loss there in the weight model's parameters, steps the weight model, and
    returns the weighted loss of the training batch for the user's own `loss.backward()` and `optimizer.step()`.
    Afterwards the student is what that one forward pass alone would have made of it.

    Source: BiKD (PAKDD 2026, arXiv 2605.17839), whose defaults these are; Meta-Weight-Net (Shu et al., 2019) and
    Learning to Reweight (Ren et al., 2018) are the same computation with another weight model. Ours differs in
    computing it without a copy of the student and without a second-order graph, in running the teacher in eval
    mode, and in taking any module, optimizer and term.

    The virtual passes run the student's forward hooks, as they may be part of its function; hooks on parameters
    and the hooks of wrappers (data parallelism) run in the user's own backward pass alone.

    A student in `DistributedDataParallel` is balanced by all ranks together: every rank calls its own balancer with its
    own batches, gradients and hypergradients are means over the ranks, and the weight model is the same on all.

    Args:
        student: any module, unchanged; wrapped as it is trained.
        terms: per-sample losses: a mapping name -> term, or a sequence of terms. A term is any callable
            (outputs, batch) -> (B,).
        optimizer: the student's own torch optimizer, or a list of those that hold its parameters together; learning
            rates, groups and state are read at every step.
        weighting: the weight model, an `nn.Module` (features (B, F), batch) -> (B, M); default `weighting.LossMLP`.
        weighting_optimizer: of the weight model; default `torch.optim.Adam(lr=1e-3, weight_decay=1e-4)`.
        teacher: a module, any other callable, or a list of them (an ensemble, whose outputs are a list); run once a
            batch, in eval mode, without gradients; or None.
        features: (losses (B, M), outputs, batch) -> (B, F), what the weight model sees, always detached. Default:
            with a teacher the cross-entropies of student and teacher on the label, without one the losses.
        meta_loss: a term, averaged over the meta batch; default `terms.CrossEntropy()`.
        inner: the lookahead's optimizer: `"sgd"` is plain SGD at the optimizer's current learning rates (the
            paper), `"mirror"` the optimizer's own rule and state, or a torchopt `GradientTransformation`.
        estimator: how the hypergradient is computed.
        accumulate: hypergradients averaged before each step of the weight model (the paper's k).
        every: take a hypergradient on every n-th call only (calls n, 2n, ...).
        batch_fn: loader item -> `Batch`; the default takes (x, y), (x, y, index), a mapping or a `Batch`.
        verify: prove exactness on this student. At the first hypergradient, and when modules, modes, hooks, shapes of
            outputs, terms or estimator change, compare the losses and the gradient of a virtual pass with those of the
            real one, and forward mode with reverse mode. That costs 3 forward passes and M + 3 backward passes, once.
            A number n repeats it at every n-th hypergradient; False leaves it out.

    Raises:
        MetaKDError: whatever does not fit, with cause and cure. After any error student, optimizer and weight
            model are bit for bit what they were.

    Examples:
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
        optimizer: Optimizers,
        weighting: nn.Module | None = None,
        weighting_optimizer: torch.optim.Optimizer | None = None,
        teacher: Teacher | None = None,
        features: Features | None = None,
        meta_loss: Term | None = None,
        inner: str | GradientTransformation = "sgd",
        estimator: Estimator = OneStep(),  # noqa: B008 (frozen)
        accumulate: int = 1,
        every: int = 1,
        batch_fn: Callable[[Any], Batch] | None = None,
        verify: bool | int = True,
    ) -> None:
        self.student, self.optimizer, self.teacher = student, optimizer, teacher
        self.terms, self.inner, self.estimator = named(terms), inner, estimator
        self.meta_loss: Term = CrossEntropy() if meta_loss is None else meta_loss
        default = own_losses if teacher is None else student_and_teacher
        self.features: Features = default if features is None else features
        self.accumulate, self.every = positive_int(accumulate, "accumulate"), positive_int(every, "every")
        self._batch_fn = batch_fn or as_batch
        check_parts(student, optimizer, estimator)
        check_teacher(teacher)
        self._proofs = Proofs(verify)
        self._ranks, plain = Ranks(student), FunctionalStudent(student)
        inner_optimizer(inner, optimizer, plain.trainable())
        if weighting is None:
            if weighting_optimizer is not None:
                raise MetaKDError("weighting_optimizer was given without weighting; pass its weight model as well")
            known = len(self.terms) if teacher is None else 2
            weighting = default_weighting(plain, known if features is None else None, len(self.terms))
        self.weighting: nn.Module = weighting
        self._functional = self._as_function()
        self._step = WeightingStep(weighting, weighting_optimizer, self.accumulate, self._ranks.mean)
        self._memory = validated(student, optimizer, estimator)
        self._report: Report | None = None
        self._calls = 0
        self._shared = self._said_zero = False

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
        with self._all_or_nothing() as snapshot, self._ranks.together():
            self._calls += 1
            meta_batch, skipped = self._turn(meta_batch)
            read = self._batch(batch, "the batch")
            self._agree(f"call {self._calls}, {'without' if meta_batch is None else 'with'} a hypergradient")
            if meta_batch is not None:
                self._prove([read], meta_batch)
            before = snapshot.keep_batch(read)
            train = TrainPass(
                self.student, self._functional, read, self.terms, snapshot.start, hooked=self._proofs.hooked
            )
            if overflow := self._overflow(train):
                return self._unweighted(train, overflow)
            with self._functional.untouched() as end:
                features = self._features_of(train, read)
                if meta_batch is None:
                    loss, self._report = self._weigh(train, read, features, skipped)
                else:
                    objective = self._objective(self._functional, [before], meta_batch, snapshot.start, end)
                    with as_written(self._functional.device_type):
                        loss, self._report = self._learn(snapshot, objective, train, features)
            self._ranks.agree("the end of the call")
            return loss

    def loss(self, batch: Any) -> Tensor:
        """The weighted loss alone, with the weights as they are; nothing is learned."""
        return self(batch, None)

    def weights(self, batch: Any) -> Tensor:
        """The weights of a batch's samples as they are now, (B, M), detached; leaves no trace."""
        with self._untouched() as start, torch.no_grad():
            known = as_it_is(self._batch(batch, "the batch"))

            def evaluated(outputs: Any) -> Tensor:
                losses = checked_losses(self.terms, outputs, known, "the batch")
                features = evaluate_features(self.features, losses, outputs, known)
                return evaluate_weights(self.weighting, features, known, losses).clone()

            weights: Tensor = self._functional.run(self._functional.detached(), known.inputs, start, evaluated)[0]
            return weights

    def meta_step(self, batches: Sequence[Any], meta_batch: Any) -> Report:
        """One hypergradient through K = len(batches) virtual inner steps, then one step of the weight model.

        The student stays where it is: the user then takes real steps with `balancer.loss(batch)`. With
        `accumulate` > 1 the weight model steps after that many hypergradients, as in a call.

        Args:
            batches: the training batches of the K inner steps, in order.
            meta_batch: the batch of the meta loss after them.

        Returns:
            The report; its losses and weights are those of the last inner step, its influence is None.

        Raises:
            MetaKDError: see the class; also an estimator that cannot take K steps.
        """
        with (
            self._all_or_nothing() as snapshot,
            self._functional.untouched() as start,
            torch.enable_grad(),
            self._ranks.together(),
        ):
            objective = self._objective(self._functional, batches, meta_batch, start)
            self._agree(f"a meta step through {len(objective.steps)} batches after call {self._calls}")
            problem = self._problem_in_phi(objective)
            self._share_weighting()
            self._prove([step.batch for step in objective.steps], objective.meta_batch)
            with as_written(self._functional.device_type):
                if self._stands_still():
                    problem.sweep()
                    report = Report(*objective.last, skipped=_STILL)
                else:
                    result = estimate(self.estimator, problem)
                    norm = self._step.take(result.gradient, snapshot.keep_optimizer)
                    report = Report(*objective.last, None, result.outer_loss, norm)
            self._ranks.agree("the end of the meta step")
            self._report = report
            return report

    def windows(self, batches: Iterable[Any], meta_batches: Iterable[Any], size: int) -> Iterator[Batch]:
        """The batches of a loader, with a `meta_step` through each `size` of them before the first is handed out.

            for batch in balancer.windows(train_loader, meta_loader, 5):
                loss = balancer.loss(batch)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

        The weight model looks as many steps ahead as the student then takes; `inner="mirror"` makes them the same
        steps. The last window may be shorter.

        Args:
            batches: the training loader.
            meta_batches: batches of the meta set, one taken for each window; a loader is begun anew where it ends, an
                iterator goes on where it is.
            size: K, the number of inner steps.

        Yields:
            The training batches in order, each a `Batch` that holds the teacher's outputs already.

        Raises:
            MetaKDError: see `meta_step`; also where an iterator over meta batches ends first.
        """
        positive_int(size, "size")
        items, meta = iter(batches), endless(meta_batches)
        while True:
            with self._ranks.together():
                window = [self._batch(item, f"batch {t}") for t, item in enumerate(islice(items, size))]
                meta_batch = next(meta) if window else None
                self._ranks.agree(f"a window of {len(window)} batches")
            if not window:
                return
            self.meta_step(window, meta_batch)
            yield from window

    def state_dict(self) -> dict[str, Any]:
        """Everything the balancer knows, as plain tensors and numbers; loads with `weights_only=True`."""
        return {**self._step.state_dict(), "calls": self._calls, "terms": list(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken, to the same numbers.

        Raises:
            MetaKDError: the state is another kind of balancer's; the message names what differs, nothing changes.
        """
        with self._all_or_nothing() as snapshot, loading("the balancer"):
            check_balancer_state(state, self.state_dict(), self.weighting)
            snapshot.keep_optimizer()
            self._step.load_state_dict(state)
            self._calls = int(state["calls"])

    def to(self, *args: Any, **kwargs: Any) -> "BilevelLossBalancer":
        """Move or cast the weight model, its optimizer's state and what is gathered, as `nn.Module.to` does.

        The student and the teacher are the user's to move; a weight model built after that is where the student is.
        """
        self.weighting.to(*args, **kwargs)
        self._step.load_state_dict(self._step.state_dict())  # states follow the parameters
        return self

    @contextmanager
    def problem(self, batches: Sequence[Any], meta_batch: Any, dtype: torch.dtype | None = None) -> Iterator[Problem]:
        """The bilevel problem of `meta_step` from here, for a block that leaves no trace; of ranks, this one's.

            with balancer.problem([batch], meta_batch) as problem:
                print(Adjoint()(problem).gradient)

        Args:
            batches: the training batches of the inner steps, in order.
            meta_batch: the batch of the meta loss after them.
            dtype: of the virtual passes: None for the student's own, `torch.float64` to look for errors.

        Raises:
            MetaKDError: see the class.
        """
        student = self._functional if dtype is None else self._as_function(dtype)
        with self._untouched(), student.untouched() as start, torch.enable_grad():
            problem = self._problem_in_phi(self._objective(student, batches, meta_batch, start))
            with as_written(student.device_type):
                yield replace(problem, memory=replace(problem.memory), mean=unchanged)

    def _as_function(self, dtype: torch.dtype | None = None) -> FunctionalStudent:
        """The student as a function, whose passes call the terms, the meta loss and the features as well."""
        return FunctionalStudent(
            self.student, dtype, lambda: [*self.terms.values(), self.meta_loss, self.features], apart=self.weighting
        )

    def _turn(self, meta_batch: Any) -> tuple[Any, str | None]:
        """The meta batch of a call that takes a hypergradient; else None, and why one that is due is skipped."""
        if meta_batch is None or self._calls % self.every:
            return None, None
        if self._stands_still():
            return None, _STILL
        if not torch.is_grad_enabled():
            raise MetaKDError("a hypergradient needs gradients; call the balancer outside torch.no_grad()")
        return meta_batch, None

    def _features_of(self, train: TrainPass, batch: Batch) -> Tensor:
        """What the weight model sees; on all ranks it is the same model from here on."""
        features = evaluate_features(self.features, train.losses, train.outputs, batch)
        if self._ranks.several and any(map(is_lazy, self.weighting.parameters())):
            self.weighting(features, batch)  # a model that finds out its sizes here cannot be sent before
        self._share_weighting()
        return features

    def _weigh(self, train: TrainPass, batch: Batch, features: Tensor, skipped: str | None) -> tuple[Tensor, Report]:
        """The loss under the weights as they are."""
        weights = evaluate_weights(self.weighting, features, batch, train.losses).detach().clone()
        return weighted_mean(weights, train.losses), Report(train.losses.detach(), weights, skipped=skipped)

    def _unweighted(self, train: TrainPass, overflow: str) -> Tensor:
        """A loss that is not finite, for a gradient scaler to see."""
        weights = torch.ones_like(train.losses)
        self._report = Report(train.losses.detach(), weights, skipped=overflow)
        return weighted_mean(weights, train.losses)

    def _learn(
        self, snapshot: Snapshot, objective: Objective, train: TrainPass, features: Tensor
    ) -> tuple[Tensor, Report]:
        """Hypergradient in the weights, then in the weight model; its step; the loss under the new weights."""
        batch, losses = objective.steps[0].batch, train.losses
        from_influence = getattr(self.weighting, "from_influence", None)
        moves = from_influence is not None or self._step.moves_next
        weights, loss, result = self._look_ahead(objective, train, features, moves=moves)
        influence = result.gradient["weights"] * losses.shape[0]
        if from_influence is not None:
            of_all, own = self._ranks.joined(influence, "the influence")
            norm = of_all.norm()
            weights = evaluate_weights(lambda *_: from_influence(of_all)[own], features, batch, losses)
        else:
            gradient = self._step.pull_back(weights, result.gradient["weights"])
            felt = self._ranks.several or bool(influence.any())
            if not (felt or self._said_zero):
                warnings.warn(_ZERO, stacklevel=5)
                self._said_zero = True
            norm = self._step.take(gradient, snapshot.keep_optimizer, felt=felt)
            if moves:
                weights = evaluate_weights(self.weighting, features, batch, losses)
        loss = weighted_mean(weights.detach(), losses) if moves else train.handed_over(loss)
        return loss, Report(losses.detach(), weights.detach().clone(), influence, result.outer_loss, norm)

    def _look_ahead(
        self, objective: Objective, train: TrainPass, features: Tensor, *, moves: bool
    ) -> tuple[Tensor, Tensor, Hypergradient]:
        """The weights of the training batch, its weighted loss, and the hypergradient in these weights."""
        rectified = getattr(self.weighting, "from_influence", None) is not None
        answer: Any = self.weighting.lookahead_weights if rectified else self.weighting
        weights = evaluate_weights(answer, features, objective.steps[0].batch, train.losses)
        loss = weighted_mean(weights.detach(), train.losses)
        self._proofs.see(train)
        problem = self._problem_in_weights(objective, train, loss, weights, keep_graph=moves)
        return weights, loss, estimate(self.estimator, problem)

    def _prove(self, batches: Sequence[Batch], meta_batch: Any) -> None:
        """Where it is due, the proof that virtual passes compute what real ones do; nothing stays of either."""
        inputs = batches[0].inputs if batches else None
        called = {**self.terms, "the meta loss": self.meta_loss}
        if not batches or not self._proofs.due(self._functional, inputs, called, self.estimator):
            return
        with self._functional.untouched() as start:
            self._proofs.give(self._objective(self._functional, batches, meta_batch, start), self._memory)

    def _stands_still(self) -> bool:
        """Whether no inner step moves the student, as a scheduler's warm-up begins with a learning rate of 0."""
        if not isinstance(self.inner, str):
            return False
        moving = {id(p) for _, g in param_groups(self.optimizer) if learning_rate(g) != 0 for p in g["params"]}
        return not any(id(p) in moving for p in self._functional.trainable().values())

    def _overflow(self, train: TrainPass) -> str | None:
        """What float16 made of the losses of this rank or another, which a gradient scaler knows how to go on from."""
        if not train.float16:
            return None
        found = not_finite(train.losses, list(self.terms), "the batch")
        of_all, _ = self._ranks.joined(torch.tensor([float(found is not None)]), "what float16 made of the losses")
        if not bool(of_all.any()):
            return None
        return f"float16 overflowed: {found or 'a loss of another rank is not finite'}; the returned loss is unweighted"

    def _objective(
        self,
        student: FunctionalStudent,
        batches: Sequence[Any],
        meta_batch: Any,
        start: Start,
        end: Start | None = None,
    ) -> Objective:
        known = [self._batch(batch, f"batch {t}") for t, batch in enumerate(batches)]
        meta = self._batch(meta_batch, "the meta batch", self.meta_loss)
        features = self.features if end is None else None  # else they are known from the real forward pass
        parts = self.terms, self.meta_loss, features, self.weighting
        return Objective(student, *parts, known, meta, start=start, end=end)

    def _problem_in_phi(self, objective: Objective) -> Problem:
        if not self._step.params():
            raise MetaKDError(
                f"{type(self.weighting).__name__} has no trainable parameters, so meta_step, windows and "
                "check_hypergradient have nothing to learn; call the balancer itself, one batch at a time"
            )
        objective.materialise()
        phi = {name: objective.student.cast(p.detach()) for name, p in self._step.params().items()}
        return self._problem(objective, objective.weighted(), phi)

    def _problem_in_weights(
        self, objective: Objective, train: TrainPass, loss: Tensor, weights: Tensor, *, keep_graph: bool
    ) -> Problem:
        """The problem of one inner step in the weights themselves, with what the real forward pass has at hand."""
        losses, given = train.losses.detach(), weights.detach()
        same = not (train.compiled or train.float16)  # a virtual pass gives the same losses, to rounding
        return self._problem(
            objective,
            objective.given_weights(),
            {"weights": given},
            first_gradient=train.gradient_of(loss, keep_graph=keep_graph) if self._proofs.repeats else None,
            first_inner=(lambda meta: weighted_mean(meta["weights"], losses)) if same else None,
        )

    def _problem(self, objective: Objective, weighted: WeightedLosses, phi: Params, **at_hand: Any) -> Problem:
        def inner(params: Params, meta: Params, step: Step) -> Tensor:
            losses = weighted.losses(params, step)  # first, for features are read off it
            return weighted_mean(weighted.weights(meta, step), losses)

        optimizer = inner_optimizer(self.inner, self.optimizer, self._functional.trainable())
        return Problem(
            inner,
            [objective.outer],
            {name: p.clone() for name, p in objective.student.detached().items()},  # a pass may write to .data
            phi,
            objective.steps,
            lambda _: optimizer.transformation,
            objective.student.cast(optimizer.state),
            memory=self._memory,
            mean=self._ranks.mean,
            weighted=weighted,
            **at_hand,
        )

    def _agree(self, where: str) -> None:
        if self._ranks.several:
            known = f"with the weight model {checksum(self.weighting)!r}" if self._shared else "its weight model new"
            self._ranks.agree(f"{where}, {self._step.pending.number} of {self.accumulate} gathered, {known}")

    def _share_weighting(self) -> None:
        self._ranks.share(self.weighting, parameters=not self._shared)
        self._shared = True

    def _batch(self, item: Any, what: str, needed_by: Term | None = None) -> Batch:
        """The item as a batch, with the teacher's outputs where anything may ask for them."""
        return read_batch(item, what, self._batch_fn, self.teacher, self._functional, needed_by)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Snapshot]:
        with self._alone():
            snapshot = Snapshot(self._functional, self._step, *map(vars, (self, self._memory, self._proofs)))
            with all_or_nothing(snapshot), explained():
                yield snapshot

    @contextmanager
    def _untouched(self) -> Iterator[Start]:
        with self._alone():
            snapshot = Snapshot(self._functional, self._step)
            with all_or_nothing(snapshot), explained(), self._functional.untouched() as start:
                yield start
                snapshot.restore()  # inside, so that an interrupted one is done again

    def _alone(self) -> AbstractContextManager[Any]:
        """A block that other threads wait for: virtual passes change settings of torch that all threads share.

        Ranks that are threads of one process have to meet inside, so they do not wait.
        """
        return nullcontext() if self._ranks.several else _ONE_AT_A_TIME


_ONE_AT_A_TIME = RLock()
_ZERO = (
    "the influence of every sample is exactly zero: the meta loss does not feel the step ahead, as with an inner "
    "learning rate of 0 or a meta loss that is flat here. If it stays so, nothing is learned"
)
_STILL = "the learning rate is 0, so that no inner step moves the student and no weight can matter"
