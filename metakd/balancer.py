"""`BilevelLossBalancer`: the object a user wraps around an existing training loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakd._basics.checks import Waiting, check, read_at_end
from metakd._basics.positive_int import positive_int
from metakd._basics.rng import capturing
from metakd._basics.together import clones
from metakd._call.arguments import (
    check_parts,
    check_sharded,
    check_sharded_terms,
    check_teacher,
    check_weighting,
    check_whole,
    default_weighting,
    trained_elsewhere,
    validated,
)
from metakd._call.capture import captured, check_capture
from metakd._call.evaluate import checked_losses, evaluate_weights, not_finite
from metakd._call.learned_terms import LearnedTerms
from metakd._call.objective import Objective, total, weighted_mean
from metakd._call.ranks import Ranks, checksum
from metakd._call.read import read_batch
from metakd._call.rollback import Snapshot, all_or_nothing
from metakd._call.saved_state import check_balancer_state, loading
from metakd._call.train_pass import TrainPass
from metakd._call.weight_step import WeightingStep
from metakd._proof.proofs import Proofs
from metakd._virtual.functional import FunctionalStudent, Start
from metakd._virtual.precision import as_written
from metakd._virtual.sharded import as_function
from metakd._virtual.teacher import Teacher
from metakd.batch import Batch, as_batch, detached_copy, endless
from metakd.errors import MetaKDError, blamed, explained
from metakd.estimators import Estimator, Hypergradient, OneStep, Problem
from metakd.estimators.estimate import estimate
from metakd.estimators.problem import Step, WeightedLosses, unchanged
from metakd.inner import GradientTransformation, Params, inner_optimizer, learning_rate, param_groups
from metakd.inner.groups import Optimizers
from metakd.report import Report
from metakd.terms import CrossEntropy, Term, named
from metakd.terms.base import nested
from metakd.weighting.features import Features, default_features, evaluate_features


class BilevelLossBalancer:
    r"""Learns how much each loss term counts for each sample, by exact hypergradients of a meta loss.

    $$\min_\phi\, L_\mathrm{meta}(\theta_K(\phi)), \qquad \theta_{t+1} = \theta_t + \mathrm{update}\Big(\nabla_\theta
      \frac{1}{B} \sum_{i=1}^{B} \sum_{k=1}^{M} w_{ik}(\phi)\, \ell_{ik}(\theta_t)\Big)$$

    with the student's parameters $\theta$, the weight model's $\phi$, and for sample i and term k the loss
    $\ell_{ik}$ and its weight $w_{ik}$. A call has K = 1 inner step, `meta_step` any number.

    A call takes a training batch and a meta batch. It runs the training forward pass, looks one optimizer step ahead,
    computes the gradient of the meta loss there in the weight model's parameters, steps the weight model, and returns
    the weighted loss of the training batch for the user's own `loss.backward()` and `optimizer.step()`. It changes the
    student exactly as that one forward pass does.

    Source: BiKD (PAKDD 2026, arXiv 2605.17839), whose defaults these are; Meta-Weight-Net (Shu et al., 2019) and
    Learning to Reweight (Ren et al., 2018) are the same computation with another weight model. Ours differs in
    computing it without a copy of the student and without a second-order graph, in running the teacher in eval
    mode, and in taking any module, optimizer and term.

    The virtual passes run the student's forward hooks, as they may be part of its function. Hooks on parameters and
    hooks of wrappers (data parallelism) run only in the user's own backward pass.

    All ranks balance a student in `DistributedDataParallel` together: every rank calls its own balancer with its own
    batches, gradients and hypergradients are means over the ranks, and all ranks share one weight model.

    Args:
        student: any module, as it is trained, wrappers included.
        terms: per-sample losses: a mapping name -> term, or a sequence of terms. A term is any callable
            (outputs, batch) -> (B,). The parameters of one that is a module are learned as well, unless the student's
            optimizer holds them.
        optimizer: the student's own torch optimizer, or a list of optimizers that together hold its parameters; every
            step reads their learning rates, groups and state.
        weighting: the weight model, an `nn.Module` (features (B, F), batch) -> (B, M); default `weighting.LossMLP`.
        weighting_optimizer: the weight model's optimizer; default what its `default_optimizer()` returns (for tables
            Adam at 0.1), or else `torch.optim.Adam(lr=1e-3, weight_decay=1e-4)`. It must hold the terms' parameters,
            too; the default has them at lr=1e-2 without decay.
        teacher: a module, any other callable, or a list of them (an ensemble, whose outputs are a list); or None. It
            runs once per batch, in eval mode, without gradients.
        features: (losses (B, M), outputs, batch) -> (B, F), the weight model's inputs, always detached. Default: the
            cross-entropies of student and teacher (each of an ensemble) on the label, or their entropies where a batch
            has no labels; without a teacher, and with terms that use none, the losses.
        meta_loss: a term, averaged over the meta batch; default `terms.CrossEntropy()`.
        inner: the lookahead's optimizer: `"sgd"` is plain SGD at the optimizer's current learning rates (the
            paper), `"mirror"` the optimizer's own rule and state, or a torchopt `GradientTransformation`.
        estimator: how the hypergradient is computed.
        accumulate: how many hypergradients each step of the weight model averages (the paper's k).
        every: take a hypergradient on every n-th call only (calls n, 2n, ...).
        batch_fn: loader item -> `Batch`; the default takes (x, y), (x, y, index), a mapping or a `Batch`.
        verify: prove exactness on this student. At the first hypergradient, and when modules, modes, hooks, switches,
            shapes of inputs, terms or estimator change, compare losses and gradients of virtual passes with those of
            real ones, and forward mode or the double backward with first-order gradients. With `OneStep` that costs 6
            forward passes, a forward-mode pass and M + 5 backward passes, once. A number n repeats it at every n-th
            hypergradient; False omits it.
        order: `"sequential"`: the weight model steps first, and the returned loss has its new weights, as in the
            published codes. `"simultaneous"`: the loss has the weights that the lookahead has judged, and the step
            counts from the next call on. The real gradient then is the lookahead's, which saves a backward pass.
        defer_checks: whether the checks of a call on numbers (finite losses and weights, labels in range, a
            hypergradient that is not zero) wait for the next call or for `read_checks`. A call then never waits for the
            device; but what fails is reported one step later, and that step stays.

    Raises:
        MetaKDError: an argument or a batch does not fit; the message has cause and cure. After any error student,
            optimizer and weight model are bit for bit as before.

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
        order: str = "sequential",
        defer_checks: bool = False,
    ) -> None:
        self.student, self.optimizer, self.teacher = student, optimizer, teacher
        self.terms, self.inner, self.estimator = named(terms), inner, estimator
        self.meta_loss: Term = CrossEntropy() if meta_loss is None else meta_loss
        default, width = default_features(self.terms, teacher)
        self.features: Features = default if features is None else features
        self.accumulate, self.every = positive_int(accumulate, "accumulate"), positive_int(every, "every")
        self._batch_fn = batch_fn or as_batch
        check_parts(student, optimizer, estimator)
        check_sharded(student, optimizer, inner)
        check_teacher(teacher)
        self._proofs, self.order = Proofs(verify), order
        self.defer_checks, self._late = defer_checks, list[Waiting]()
        self._ranks, plain = Ranks(student), as_function(student)
        inner_optimizer(inner, optimizer, plain.trainable())
        if weighting is None:
            if weighting_optimizer is not None:
                raise MetaKDError("weighting_optimizer was given without weighting; pass its weight model as well")
            weighting = default_weighting(plain, width if features is None else None, len(self.terms))
        check_weighting(weighting, order)
        self.weighting: nn.Module = weighting
        self._functional = self._as_function()
        learned = LearnedTerms(self.terms, student, trained_elsewhere(optimizer, teacher), weighting)
        check_sharded_terms(student, learned.params())
        self._step = WeightingStep(weighting, learned, weighting_optimizer, self.accumulate, self._ranks.mean)
        self._memory = validated(student, optimizer, estimator)
        self._report: Report | None = None
        self._calls = 0
        self._shared = self._said_zero = self._phased = False

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
        """Take the hypergradient, step the weight model, and return the weighted loss with the student's graph.

        Args:
            batch: a training batch, as the loader yields it.
            meta_batch: a batch of the meta set; None for no hypergradient in this call.

        Returns:
            The scalar (1/B) sum_ik w_ik l_ik; the caller runs `.backward()` and `optimizer.step()`.

        Raises:
            MetaKDError: see the class.
        """
        if capturing():
            check_capture(self)
        else:
            self.read_checks()
        with self._all_or_nothing() as snapshot, self._ranks.together():
            self._calls += 1
            meta_batch, skipped = self._turn(meta_batch)
            read = self._batch(batch, "the batch")
            self._agree(f"call {self._calls}, {'without' if meta_batch is None else 'with'} a hypergradient")
            self._share_terms()
            if meta_batch is not None:
                meta_batch = self._prove([read], meta_batch)
            loss = self._trained(snapshot, read, meta_batch, skipped)
            self._ranks.agree("the end of the call")
            return loss

    def read_checks(self) -> None:
        """Read the checks of the last call that `defer_checks` has left waiting; the next call does so, too.

        After a replay of a CUDA graph that captured a call, it reads those of the replay.

        Raises:
            MetaKDError: one failed. The last call is not undone.
        """
        late, self._late = self._late, [waiting for waiting in self._late if waiting.captured]
        with blamed("a check of the last call"):
            for waiting in late:
                waiting.judge()

    def capture(self, iteration: Callable[..., Any], *, check_every: int = 100) -> Callable[..., Any]:
        """Make an iteration of a training loop one CUDA graph, so that a GPU need not wait for Python.

        The result takes the same batches. Its first calls run the iteration as written, a later one captures it, and
        from then on a call copies the batches' tensors and replays the graph. It is captured anew when something
        changes that a graph holds as a constant: numbers of the optimizers, such as learning rates; modules, their
        modes and attributes; hooks; terms; the memory of parameters. Batches of another shape have a graph of their
        own. Without a GPU every call runs as written.

        What an iteration returns, `report` included, is overwritten by the next replay. Numbers of the user's own
        that the iteration reads stay those of the capture. The student must draw no random numbers, and gradient
        scalers and optimizers that read numbers from the device cannot be captured. The weight model's optimizer is
        made capturable, the student's is the user's: Adam needs `capturable=True`. With `accumulate` and `every` each
        call of a window has a graph of its own; they share their memory.

        Args:
            iteration: the body of the loop: a call of the balancer, `backward`, the optimizer's step.
            check_every: replays after which the checks of a call are read, by a host sync. What fails is reported that
                much later, and the steps stay; `read_checks` reads them at any time.

        Raises:
            MetaKDError: see the class; also, in the call that captures, what cannot be captured.

        Examples:
            >>> student = nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            >>> balancer = BilevelLossBalancer(student, {"hard": CrossEntropy()}, optimizer=optimizer)
            >>> def iteration(batch, meta_batch):
            ...     loss = balancer(batch, meta_batch)
            ...     optimizer.zero_grad()
            ...     loss.backward()
            ...     optimizer.step()
            ...     return loss.detach()
            >>> step = balancer.capture(iteration)
            >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
            >>> losses = [step(batch, batch) for _ in range(5)]
        """
        return captured(self, iteration, check_every)

    def loss(self, batch: Any) -> Tensor:
        """The weighted loss under the present weights; nothing is learned."""
        return self(batch, None)

    def weights(self, batch: Any) -> Tensor:
        """The present weights of a batch's samples, (B, M), detached; nothing changes."""
        with self._untouched() as start, torch.no_grad():
            known = detached_copy(self._batch(batch, "the batch"))

            def evaluated(outputs: Any) -> Tensor:
                losses = checked_losses(self.terms, outputs, known, "the batch")
                features = evaluate_features(self.features, losses, outputs, known)
                return evaluate_weights(self.weighting, features, known, losses).clone()

            weights: Tensor = self._functional.run(self._functional.detached(), known.inputs, start, evaluated)[0]
            return weights

    def meta_step(self, batches: Sequence[Any], meta_batch: Any) -> Report:
        """One hypergradient through K = len(batches) virtual inner steps, then one step of the weight model.

        The student does not move; the user then takes real steps with `balancer.loss(batch)`. With
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
                    report = Report(*objective.last, skipped=_STILL, **self._of_terms())
                else:
                    result = estimate(self.estimator, problem)
                    norm = self._step.take(result.gradient, snapshot.keep_optimizer)
                    check(partial(self._judge_norm, None), norm)
                    report = Report(*objective.last, None, result.outer_loss, norm, **self._of_terms())
            self._ranks.agree("the end of the meta step")
            self._report = report
            return report

    def windows(self, batches: Iterable[Any], meta_batches: Iterable[Any], size: int) -> Iterator[Batch]:
        """The batches of a loader, with a `meta_step` through each window of `size` batches before its first batch.

            for batch in balancer.windows(train_loader, meta_loader, 5):
                loss = balancer.loss(batch)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

        The weight model looks as many steps ahead as the student then takes; `inner="mirror"` makes them the same
        steps. The last window may be shorter.

        Args:
            batches: the training loader.
            meta_batches: batches of the meta set, one for each window; a loader restarts when it ends, an iterator
                continues.
            size: K, the number of inner steps.

        Yields:
            The training batches in order, each a `Batch` with the teacher's outputs.

        Raises:
            MetaKDError: see `meta_step`; also if an iterator over meta batches ends first.
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
        """The balancer's whole state as plain tensors and numbers; loads with `weights_only=True`."""
        return {**self._step.state_dict(), "calls": self._calls, "terms": list(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, to the same numbers.

        Raises:
            MetaKDError: the state does not fit this balancer; the message names the difference, and nothing changes.
        """
        with self._all_or_nothing() as snapshot, loading("the balancer"):
            check_balancer_state(state, self.state_dict(), self.weighting, self._step.learned.params())
            snapshot.keep_optimizer()
            self._step.load_state_dict(state)
            self._calls = int(state["calls"])

    def to(self, *args: Any, **kwargs: Any) -> "BilevelLossBalancer":
        """Move or cast the weight model, terms that are modules, and pending hypergradients, as `nn.Module.to` does.

        The optimizer's state follows. The user moves student and teacher; a default weight model is built on the
        student's device.
        """
        self.weighting.to(*args, **kwargs)
        self._step.learned.to(*args, **kwargs)
        self._step.load_state_dict(self._step.state_dict())  # states follow the parameters
        return self

    @contextmanager
    def problem(self, batches: Sequence[Any], meta_batch: Any, dtype: torch.dtype | None = None) -> Iterator[Problem]:
        """The bilevel problem of `meta_step` in a block that leaves no trace; with several ranks, this rank's own.

            with balancer.problem([batch], meta_batch) as problem:
                print(Adjoint()(problem).gradient)

        Args:
            batches: the training batches of the inner steps, in order.
            meta_batch: the batch of the meta loss after them.
            dtype: for the virtual passes: None for the student's own, `torch.float64` to look for errors.

        Raises:
            MetaKDError: see the class.
        """
        check_whole(self.student)
        student = self._functional if dtype is None else self._as_function(dtype)
        with self._untouched(), student.untouched() as start, torch.enable_grad():
            problem = self._problem_in_phi(self._objective(student, batches, meta_batch, start))
            with as_written(student.device_type):
                yield replace(problem, memory=replace(problem.memory), mean=unchanged)

    def _as_function(self, dtype: torch.dtype | None = None) -> FunctionalStudent:
        """The student as a function; its passes also call the terms, the meta loss and the features."""
        return as_function(self.student, dtype, self._called, excluded=self.weighting)

    def _called(self) -> list[Any]:
        """What a pass calls beside the student."""
        return [*chain.from_iterable(map(nested, (*self.terms.values(), self.meta_loss))), self.features]

    def _turn(self, meta_batch: Any) -> tuple[Any, str | None]:
        """The meta batch if this call takes a hypergradient, else None; and why a due one is skipped."""
        if meta_batch is None or self._calls % self.every:
            return None, None
        if self._stands_still():
            return None, _STILL
        if not torch.is_grad_enabled():
            raise MetaKDError("a hypergradient needs gradients; call the balancer outside torch.no_grad()")
        return meta_batch, None

    def _trained(self, snapshot: Snapshot, batch: Batch, meta_batch: Batch | None, skipped: str | None) -> Tensor:
        """The training pass, the hypergradient of a given meta batch, and the weighted loss; sets the report."""
        with read_at_end(self._late.append if self.defer_checks else None) as checks:
            lending = self._proofs.lending
            before = batch if lending.only_read else snapshot.keep_batch(batch)
            with lending.lend(batch, itself=True):
                parts = self.student, self._functional, batch, self.terms, snapshot.start, self._step.learned
                proven = self._proofs
                train = TrainPass(*parts, hooked=proven.hooked, may_be_float16=proven.may_be_float16)
            if overflow := self._overflow(train):
                return self._unweighted(train, overflow)
            with self._functional.untouched() as end:
                features = self._features_of(train, batch)
                if meta_batch is None:
                    loss, self._report = self._weigh(train, batch, features, skipped)
                    return loss
                objective = self._objective(self._functional, [before], meta_batch, snapshot.start, end)
                with as_written(self._functional.device_type):
                    loss, self._report = self._learn(snapshot, objective, train, features)
                    if not self.defer_checks:
                        checks.judge()  # inside the block, as a failed one may run virtual passes to find its cause
                    return loss

    def _features_of(self, train: TrainPass, batch: Batch) -> Tensor:
        """The weight model's inputs; also gives all ranks the same weight model."""
        features = evaluate_features(self.features, train.losses, train.outputs, batch)
        if self._ranks.several and any(map(is_lazy, self.weighting.parameters())):
            self.weighting(features, batch)  # lazy layers have no sizes to send before their first batch
        self._share_weighting()
        return features

    def _weigh(self, train: TrainPass, batch: Batch, features: Tensor, skipped: str | None) -> tuple[Tensor, Report]:
        """The loss under the present weights, and its report."""
        weights = evaluate_weights(self.weighting, features, batch, train.losses)
        used = weights.detach().clone()
        report = Report(train.losses.detach(), used, skipped=skipped, **self._of_terms())
        return total(used / used.shape[0], train.losses, weights), report

    def _unweighted(self, train: TrainPass, overflow: str) -> Tensor:
        """A loss that is not finite, so that a gradient scaler sees the overflow."""
        weights = torch.ones_like(train.losses)
        self._report = Report(train.losses.detach(), weights, skipped=overflow, **self._of_terms())
        return weighted_mean(weights, train.losses)

    def _learn(
        self, snapshot: Snapshot, objective: Objective, train: TrainPass, features: Tensor
    ) -> tuple[Tensor, Report]:
        """Take the hypergradient, step the weight model, and return the loss under the new weights with its report."""
        batch, losses = objective.steps[0].batch, train.losses
        from_influence = getattr(self.weighting, "from_influence", None)
        moves = self.order == "sequential" and (from_influence is not None or self._step.moves_next)
        weights, loss, result = self._look_ahead(objective, train, features, moves=moves)
        influence = result.gradient["weights"] * losses.shape[0]
        if from_influence is not None:
            all_ranks, own = self._ranks.joined(influence, "the influence")
            norm = all_ranks.norm()
            weights = evaluate_weights(lambda *_: from_influence(all_ranks)[own], features, batch, losses)
        else:
            gradient = self._step.pull_back(weights, result.gradient)
            norm = self._step.take(gradient, snapshot.keep_optimizer)
            check(partial(self._judge_norm, influence), norm)
            if moves:
                losses = train.evaluate_again() if self._step.learned.params() else losses
                weights = evaluate_weights(self.weighting, features, batch, losses)
        used = weights.detach().clone()
        loss = total(used / used.shape[0], losses, weights) if loss is None else train.handed_over(loss)
        report = Report(losses.detach(), used, influence, result.outer_loss, norm, **self._of_terms())
        return loss, report

    def _judge_norm(self, influence: Tensor | None, norm: float) -> None:
        """Raise if the hypergradient is zero although the influence is not; warn once if both are."""
        if norm != 0.0 or any(p.grad is not None and bool(p.grad.any()) for p in self._step.params().values()):
            return
        if influence is None or self._ranks.several or bool(influence.any()):
            raise MetaKDError(self._step.why_zero())
        if not self._said_zero:
            warnings.warn(_ZERO, stacklevel=7)
            self._said_zero = True

    def _look_ahead(
        self, objective: Objective, train: TrainPass, features: Tensor, *, moves: bool
    ) -> tuple[Tensor, Tensor | None, Hypergradient]:
        """The weights of the training batch, its weighted loss if they do not move, and the hypergradient in them."""
        rectified = getattr(self.weighting, "from_influence", None) is not None
        answer: Any = self.weighting.lookahead_weights if rectified else self.weighting
        weights = evaluate_weights(answer, features, objective.steps[0].batch, train.losses)
        shares = weights.detach() / train.losses.shape[0]
        loss = None if moves else total(shares, train.losses, weights)
        self._proofs.check_train_pass(train)
        problem = self._problem_in_weights(objective, train, shares, weights, keep_graph=moves)
        return weights, loss, estimate(self.estimator, problem)

    def _prove(self, batches: Sequence[Batch], meta_batch: Any) -> Any:
        """Prove, if due, that virtual passes compute what real passes do; it leaves no trace.

        Returns the meta batch as it was read, so that the teacher does not run on it again.
        """
        inputs = batches[0].inputs if batches else None
        called = {**self.terms, "the meta loss": self.meta_loss}
        if not batches:
            return meta_batch
        due = self._proofs.due(self._functional, inputs, called, self.estimator)
        if due and capturing():
            raise MetaKDError(
                "this call cannot be captured in a CUDA graph: a proof of exactness is due; call once more as written, "
                "with batches of this kind and verify=True"
            )
        if not self._ranks.any_of(self._functional, due):
            return meta_batch
        with self._functional.untouched() as start:
            objective = self._objective(self._functional, batches, meta_batch, start)
            self._proofs.prove(objective, self._memory, self._ranks, self.estimator)
            return objective.meta_batch

    def _stands_still(self) -> bool:
        """Whether all learning rates are 0, as when a scheduler's warm-up begins: no inner step moves the student."""
        if not isinstance(self.inner, str):
            return False
        moving = {id(p) for _, g in param_groups(self.optimizer) if learning_rate(g) != 0 for p in g["params"]}
        return not any(id(p) in moving for p in self._functional.trainable().values())

    def _of_terms(self) -> dict[str, Any]:
        """What a report says of the terms themselves."""
        return {"terms": tuple(self.terms), "term_parameters": self._step.learned.values()}

    def _overflow(self, train: TrainPass) -> str | None:
        """Which loss overflowed in float16 on any rank, or None; a gradient scaler then skips the step."""
        if not train.float16:
            return None
        found = not_finite(train.losses, list(self.terms), "the batch")
        all_ranks, _ = self._ranks.joined(torch.tensor([float(found is not None)]), "what float16 made of the losses")
        if not bool(all_ranks.any()):
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
        features = self.features if end is None else None  # the real forward pass has given the weights already
        parts = self.terms, self.meta_loss, features, self.weighting, self._step.learned
        return Objective(student, *parts, known, meta, self._proofs.lending, start=start, end=end)

    def _problem_in_phi(self, objective: Objective) -> Problem:
        if not self._step.params():
            raise MetaKDError(
                f"{type(self.weighting).__name__} has no trainable parameters, nor has a term, so meta_step, windows "
                "and check_hypergradient have nothing to learn; call the balancer itself, one batch at a time"
            )
        objective.materialise()
        phi = {name: objective.student.cast(p.detach()) for name, p in self._step.params().items()}
        return self._problem(objective, objective.weighted(), phi)

    def _problem_in_weights(
        self, objective: Objective, train: TrainPass, shares: Tensor, weights: Tensor, *, keep_graph: bool
    ) -> Problem:
        """The problem of one inner step in the weights themselves, with values known from the real pass."""
        losses, given = train.losses.detach(), weights.detach()
        learned = {name: objective.student.cast(p.detach()) for name, p in self._step.learned.params().items()}
        # A virtual pass gives the same losses, to rounding; those of learned terms are no constants.
        same = not (learned or train.compiled or train.float16)
        return self._problem(
            objective,
            objective.given_weights(),
            {"weights": given, **learned},
            first_gradient=train.gradient_of(shares, keep_graph=keep_graph) if self._proofs.repeats else None,
            first_inner=(lambda meta: weighted_mean(meta["weights"], losses)) if same else None,
        )

    def _problem(self, objective: Objective, weighted: WeightedLosses, phi: Params, **known: Any) -> Problem:
        def inner(params: Params, meta: Params, step: Step) -> Tensor:
            losses = weighted.at(meta).losses(params, step)  # first, because the weights need its features
            return weighted_mean(weighted.weights(meta, step), losses)

        optimizer = inner_optimizer(self.inner, self.optimizer, self._functional.trainable())
        theta = objective.student.detached()
        return Problem(
            inner,
            [objective.outer],
            dict(zip(theta, clones(list(theta.values())), strict=True)),  # a pass may write to .data
            phi,
            objective.steps,
            lambda _: optimizer.transformation,
            objective.student.cast(optimizer.state),
            memory=self._memory,
            mean=self._ranks.mean_of(self._functional),
            norm=self._ranks.norm_of(self._functional),
            weighted=weighted,
            **known,
        )

    def _agree(self, where: str) -> None:
        if self._ranks.several:
            every = self._step.every
            known = f"with the weight model {checksum(every())!r}" if self._shared else "its weight model new"
            self._ranks.agree(f"{where}, {self._step.pending.number} of {self.accumulate} gathered, {known}")

    def _share_weighting(self) -> None:
        if self._ranks.several:
            self._ranks.share([*self.weighting.buffers(), *(() if self._shared else self._step.every())])
        self._shared = True

    def _share_terms(self) -> None:
        """Give all ranks the same terms before their first losses."""
        if not self._shared:
            self._ranks.share(list(self._step.learned.named.values()))

    def _batch(self, item: Any, what: str, needed_by: Term | None = None) -> Batch:
        """The item as a batch, with the teacher's outputs if a term may need them."""
        return read_batch(item, what, self._batch_fn, self.teacher, self._functional, needed_by)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Snapshot]:
        with self._alone():
            snapshot = Snapshot(self._functional, self._step, *map(vars, (self, self._memory, self._proofs)))
            with all_or_nothing(snapshot), explained(), self._functional.since(snapshot.start):
                yield snapshot

    @contextmanager
    def _untouched(self) -> Iterator[Start]:
        with self._alone():
            snapshot = Snapshot(self._functional, self._step)
            known = self._functional.since(snapshot.start)
            with all_or_nothing(snapshot), explained(), known, self._functional.untouched() as start:
                yield start
                snapshot.restore()  # inside the block, which repeats it if it is interrupted

    def _alone(self) -> AbstractContextManager[Any]:
        """A block that other threads wait for: virtual passes change settings of torch that all threads share.

        Ranks may be threads of one process; they must meet inside the block, so they do not wait.
        """
        return nullcontext() if self._ranks.several else _ONE_AT_A_TIME


_ONE_AT_A_TIME = RLock()
_ZERO = (
    "the influence of every sample is exactly zero: the meta loss does not depend on the lookahead's step, as with an "
    "inner learning rate of 0 or a meta loss that is flat here. If this continues, nothing is learned"
)
_STILL = "the learning rate is 0, so no inner step moves the student and no weight can matter"
