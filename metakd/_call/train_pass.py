"""The real training forward pass, and the gradient that the lookahead takes from its graph."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from metakd._autodiff import Gradients, gradients, graph_leaves
from metakd._basics.module_call import call
from metakd._basics.nest import tensors
from metakd._call.evaluate import checked_losses
from metakd._call.known_gradient import hand_over
from metakd._virtual.functional import FunctionalStudent, Start, data_parallel
from metakd._virtual.kernels import compiled_parts
from metakd._virtual.precision import autocasts_to_float16, ran_in_float16
from metakd._virtual.swapping import swapped
from metakd.batch import Batch
from metakd.inner import as_real
from metakd.terms import Term


class TrainPass:
    """One forward pass of the student itself and its terms: it updates batch statistics and draws random numbers.

    The gradient of a loss on its graph is taken without touching `.grad` and without running the hooks that the user
    registered on parameters; where nothing stands in the way, the same gradient serves the user's `loss.backward()`.

    Args:
        student: the module the user trains, wrappers included.
        functional: the same student as a function.
        batch: the training batch, whose tensors the pass may write to.
        terms: evaluated on the outputs.
        start: where the pass starts.
        hooked: whether the pass is known to hang hooks on activations.
        what: the batch's name in errors.

    Attributes:
        outputs: of the student.
        losses: (B, M) of the terms; they may be infinite where the pass ran in float16.
        written: the names of parameters that the pass wrote to.

    Examples:
        >>> student, batch = nn.Linear(2, 1, bias=False), Batch(torch.ones(1, 2))
        >>> functional = FunctionalStudent(student)
        >>> train = TrainPass(student, functional, batch, {"sum": lambda z, batch: z.sum(1)}, functional.start())
        >>> train.gradient_of(train.losses.sum(), keep_graph=False)(["weight"])
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
        *,
        hooked: bool = False,
        what: str = "the batch",
    ) -> None:
        self.compiled = bool(compiled_parts(student))
        self._variables = functional.trainable()
        self._hooked = any(p._backward_hooks for p in self._variables.values())
        # What hooks on activations see in the user's backward pass, a gradient handed over would not show them.
        self._watched = hooked or any(
            m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in student.modules()
        )
        self._upstream = any(t.requires_grad for t in tensors((batch.inputs, batch.targets)))
        self._cast = functional.cast
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor | None] | None = None
        views: dict[int, Tensor] = {}
        if self._hooked:
            # Gradients taken at a view of a parameter do not run the parameter's hooks; the real backward does.
            views = {id(p): p.view_as(p) for p in self._variables.values()}
            self._variables = {name: views[id(p)] for name, p in self._variables.items()}
            # The wrapper for several processes has to know of a forward pass whose gradients it is to average.
            student = data_parallel(student) or functional.module
        self.float16 = autocasts_to_float16(functional.device_type)
        versions = {name: p._version for name, p in self._variables.items()}
        with swapped(start.state.tensors, views):
            self.outputs = call(student, batch.inputs)
            # Gradients are below float16's range unless a scaler lifts them, which the user's own backward pass may.
            self.float16 = self.float16 or ran_in_float16(tensors(self.outputs))
            self.losses = checked_losses(terms, self.outputs, batch, what, finite=not self.float16)
        self.written = [name for name, p in self._variables.items() if p._version != versions[name]]
        start.state.check_written()

    @property
    def can_hand_over(self) -> bool:
        """Whether the gradient may stand in for the real backward pass: exact, and with no one else to notice."""
        return not (self._hooked or self._watched or self._upstream or self.float16)

    def gradient_of(self, loss: Tensor, *, keep_graph: bool) -> Callable[[Collection[str]], Gradients] | None:
        """Gives the gradient of the loss in the parameters of some names, None for those that it does not reach.

        Where the loss needs its own backward pass later (`keep_graph`) no more than these is computed; else all, to be
        handed over.

        None in place of the function where the pass ran in float16, and where the user's backward pass needs the graph
        again and compiled code lets it go after the first.
        """
        if self.float16:
            return None
        keep_graph = keep_graph or not self.can_hand_over
        return None if keep_graph and self.compiled else partial(self._gradient, loss, keep_graph)

    def _gradient(self, loss: Tensor, keep_graph: bool, names: Collection[str]) -> Gradients:
        if not loss.requires_grad:
            return dict.fromkeys(names)
        if keep_graph:
            wanted = {name: self._variables[name] for name in names}
            return {name: self._known(g) for name, g in gradients(loss, wanted, retain_graph=True).items()}
        if self._gradients is None:  # an estimator may ask twice
            self._leaves = graph_leaves(loss)
            # The graph stays, for the user may hold other losses on it, such as an auxiliary loss of the model.
            retain = not self.compiled
            self._gradients = list(torch.autograd.grad(loss, self._leaves, retain_graph=retain, allow_unused=True))
        found = {id(leaf): g for leaf, g in zip(self._leaves, self._gradients, strict=True)}
        return {name: self._known(found.get(id(self._variables[name]))) for name in names}

    def last_gradient_of(self, loss: Tensor, names: Collection[str]) -> Gradients:
        """The same by a backward pass after which the graph is gone."""
        found = gradients(loss, {name: self._variables[name] for name in names})
        return {name: self._known(g) for name, g in found.items()}

    def _known(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as estimators want it: dense, real, in the dtype of virtual passes."""
        if gradient is None:
            return None
        known: Tensor = self._cast(as_real(gradient.to_dense()))
        return known

    def handed_over(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is known: its backward hands that on, where it may."""
        if self._gradients is None or not self.can_hand_over:
            return loss
        return hand_over(loss, self._leaves, self._gradients)
