"""The real training forward pass, and the gradient that the lookahead takes from its graph."""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from metakd._autodiff import Gradients, Params, graph_leaves
from metakd._basics.module_call import call
from metakd._basics.nest import tensors
from metakd._call.evaluate import checked_losses
from metakd._call.known_gradient import hand_over
from metakd._call.learned_terms import LearnedTerms
from metakd._virtual.functional import FunctionalStudent, Start, data_parallel
from metakd._virtual.kernels import is_compiled
from metakd._virtual.precision import autocasts_to_float16, ran_in_float16
from metakd._virtual.swapping import swap_in
from metakd.batch import Batch
from metakd.inner import as_real
from metakd.terms import Term


class TrainPass:
    """One forward pass of the student itself and its terms; it updates batch statistics and draws random numbers.

    The lookahead's gradient comes from this pass's graph, without touching `.grad` and without running hooks on
    parameters. If nobody would notice, the user's `loss.backward()` reuses that gradient instead of running the graph
    again.

    Args:
        student: the module the user trains, wrappers included.
        functional: the same student as a function.
        batch: the training batch; the pass may write to its tensors.
        terms: evaluated on the outputs.
        start: where the pass starts.
        learned: the terms' own meta-parameters, constants in this pass; None if they should get gradients from it.
        hooked: whether the pass is known to register hooks on activations.
        may_be_float16: whether the pass may run in float16 without an autocast block around it.
        what: the batch's name in errors.

    Attributes:
        outputs: the student's.
        losses: (B, M), infinite ones allowed if the pass ran in float16.
        written: names of the parameters that the pass wrote to.

    Examples:
        >>> student, batch = nn.Linear(2, 1, bias=False), Batch(torch.ones(1, 2))
        >>> functional = FunctionalStudent(student)
        >>> train = TrainPass(student, functional, batch, {"sum": lambda z, batch: z.sum(1)}, functional.start())
        >>> train.gradient_of(torch.ones_like(train.losses), keep_graph=False)(["weight"])
        {'weight': tensor([[1., 1.]])}
        >>> train.handed_over(train.losses.sum()).backward()
        >>> student.weight.grad
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        student: nn.Module,
        functional: FunctionalStudent,
        batch: Batch,
        terms: Mapping[str, Term],
        start: Start,
        learned: LearnedTerms | None = None,
        *,
        hooked: bool = False,
        may_be_float16: bool = True,
        what: str = "the batch",
    ) -> None:
        modules = list(student.modules())
        self.compiled = any(map(is_compiled, modules))
        self._variables = functional.trainable()
        self._hooked = any(p._backward_hooks for p in self._variables.values())
        # Hooks on activations run in a backward pass through the graph only, so the gradient must not be handed over.
        self._watched = hooked or any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
        self._upstream = any(t.requires_grad for t in tensors((batch.inputs, batch.targets)))
        self._cast, self._gradients_in = functional.cast, functional.gradients
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor | None] | None = None
        views: dict[int, Tensor] = {}
        if self._hooked:
            # Gradients with respect to a view of a parameter skip the parameter's hooks; the user's backward runs them.
            views = {id(p): p.view_as(p) for p in self._variables.values()}
            self._variables = {name: views[id(p)] for name, p in self._variables.items()}
            # DistributedDataParallel averages gradients only after a forward pass through its wrapper.
            student = data_parallel(student) or functional.module
        kind = functional.device_type
        self.float16 = autocasts_to_float16(kind)
        versions = {name: p._version for name, p in self._variables.items()}
        self._autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._parts = terms, batch, what, start, views, learned
        with swap_in(start.state.tensors, views):
            self.outputs = call(student, batch.inputs)
            # Gradients underflow in float16 unless a scaler scales the loss, which only the user's backward pass does.
            self.float16 = self.float16 or (may_be_float16 and ran_in_float16(tensors(self.outputs)))
        self._evaluate()
        self.written = [name for name, p in self._variables.items() if p._version != versions[name]]
        start.state.check_written()

    def evaluate_again(self) -> Tensor:
        """Evaluate the terms again on the same outputs, after their own parameters have moved."""
        kind, enabled, dtype = self._autocast
        with torch.autocast(kind, dtype) if enabled else nullcontext():  # as the user has it
            self._evaluate()
        return self.losses

    def _evaluate(self) -> None:
        terms, batch, what, start, views, learned = self._parts
        constants = {} if learned is None else {id(p): p.detach().clone() for p in learned.params().values()}
        with swap_in(start.state.tensors, {**views, **constants}):
            self.losses = checked_losses(terms, self.outputs, batch, what, finite=not self.float16)

    @property
    def can_hand_over(self) -> bool:
        """Whether the gradient may replace the real backward pass: it is exact, and nobody observes the graph."""
        return not (self._hooked or self._watched or self._upstream or self.float16)

    def gradient_of(self, shares: Tensor, *, keep_graph: bool) -> Callable[[Collection[str]], Gradients] | None:
        """A function from names of parameters to the gradient of sum_ik shares_ik l_ik; None if the graph has none.

        With `keep_graph` that sum needs its own backward pass later, so only the gradients asked for are computed.
        Otherwise all are, for `handed_over`. The graph cannot give it in float16, nor if compiled code would free the
        graph that the user still needs.
        """
        if self.float16:
            return None
        keep_graph = keep_graph or not self.can_hand_over
        losses = self.losses
        return None if keep_graph and self.compiled else partial(self._gradient, losses, shares.to(losses), keep_graph)

    def _gradient(self, losses: Tensor, shares: Tensor, keep_graph: bool, names: Collection[str]) -> Gradients:
        if not losses.requires_grad:
            return dict.fromkeys(names)
        if keep_graph:
            wanted = {name: self._variables[name] for name in names}
            kept = self._gradients_in(losses, wanted, shares, retain_graph=True)
            return {name: self._known(g) for name, g in kept.items()}
        if self._gradients is None:  # an estimator may ask several times
            self._leaves = graph_leaves(losses)
            # Keep the graph: the user may have another loss on it, such as an auxiliary loss of the model.
            retain = not self.compiled
            found = torch.autograd.grad(losses, self._leaves, shares, retain_graph=retain, allow_unused=True)
            self._gradients = list(found)
        by_id = {id(leaf): g for leaf, g in zip(self._leaves, self._gradients, strict=True)}
        return {name: self._known(by_id.get(id(self._variables[name]))) for name in names}

    def last_gradient_of(self, loss: Tensor, names: Collection[str], others: Params | None = None) -> Gradients:
        """The loss's gradient, also in `others`, by a backward pass that frees the graph."""
        found = self._gradients_in(loss, {name: self._variables[name] for name in names} | (others or {}))
        return {name: self._known(g) for name, g in found.items()}

    def _known(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as estimators expect it: dense, real, in the dtype of virtual passes."""
        if gradient is None:
            return None
        known: Tensor = self._cast(as_real(gradient.to_dense()))
        return known

    def handed_over(self, loss: Tensor) -> Tensor:
        """The loss; if its gradient is known and may be reused, its backward passes that on."""
        if self._gradients is None or not self.can_hand_over:
            return loss
        return hand_over(loss, self._leaves, self._gradients)
