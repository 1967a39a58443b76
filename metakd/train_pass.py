"""The real training forward pass, and the gradient that the lookahead takes from its graph."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakd.batch import Batch, tensors
from metakd.calling import call
from metakd.derivatives import Gradients
from metakd.graph import graph_leaves
from metakd.handover import hand_over
from metakd.kernels import compiled_parts
from metakd.precision import autocasts_to_float16, ran_in_float16
from metakd.replay import Product, recorded
from metakd.student import FunctionalStudent, data_parallel


class TrainPass:
    """One forward pass of the student itself: it updates batch statistics and draws random numbers.

    The gradient of a loss on its outputs is taken without touching `.grad` and without running the hooks that the user
    registered on parameters; where nothing stands in the way, the same gradient serves the user's `loss.backward()`.

    Args:
        student: the module the user trains, wrappers included.
        functional: the same student as a function.
        batch: the training batch.
        record: keep the products for a forward-mode pass over the same batch.
        still: keep more of it, for that pass has layers at its beginning that do not move.

    Examples:
        >>> student = nn.Linear(2, 1, bias=False)
        >>> train = TrainPass(student, FunctionalStudent(student), Batch(torch.ones(1, 2)))
        >>> train.gradient_of(train.outputs.sum(), keep_graph=False)(["weight"])
        {'weight': tensor([[1., 1.]])}
        >>> train.handed_over(train.outputs.sum()).backward()
        >>> student.weight.grad
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        student: nn.Module,
        functional: FunctionalStudent,
        batch: Batch,
        *,
        record: bool = False,
        still: bool = False,
    ) -> None:
        self._variables = functional.trainable()
        self._hooked = any(p._backward_hooks for p in self._variables.values())
        self._upstream = any(t.requires_grad for t in tensors((batch.inputs, batch.targets)))
        self._compiled = bool(compiled_parts(student))
        self._cast = functional.cast
        self.float16 = autocasts_to_float16(functional.device_type)
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor | None] | None = None
        self.tape: Sequence[Product] = ()
        if self._hooked:
            # Gradients taken at a view of a parameter do not run the parameter's hooks; the real backward does.
            self._variables = {name: p.view_as(p) for name, p in self._variables.items()}
            # The wrapper for several processes has to know of a forward pass whose gradients it is to average.
            module = data_parallel(student) or functional.module
            views = {id(p): self._variables[name] for name, p in functional.trainable().items()}
            params = {name: views[id(p)] for name, p in module.named_parameters() if id(p) in views}
            forward = partial(call, module, batch.inputs, params)
        else:
            forward = partial(call, student, batch.inputs)
        if record and not (self._compiled or self.float16):
            with recorded(others=still) as self.tape:
                self.outputs: Any = forward()
        else:
            self.outputs = forward()
        if self.float16 or ran_in_float16(tensors(self.outputs)):
            # Gradients are below its range unless a scaler lifts them, which the user's own backward pass may.
            self.float16, self.tape = True, ()

    @property
    def repeats(self) -> bool:
        """Whether a virtual pass over the same batch gives the same, to rounding."""
        return not (self._compiled or self.float16)

    @property
    def can_hand_over(self) -> bool:
        """Whether the gradient may stand in for the real backward pass: exact, and with no one else to notice."""
        return not (self._hooked or self._upstream or self.float16)

    def gradient_of(self, loss: Tensor, *, keep_graph: bool) -> Callable[[Collection[str]], Gradients] | None:
        """Gives the gradient of the loss in the parameters of some names, None for those that it does not reach.

        Where the graph is kept no more than these is computed; else all, to be handed over.

        None in place of the function where the pass ran in float16, and where the user's backward pass needs the graph
        again and compiled code lets it go after the first.
        """
        if self.float16:
            return None
        keep_graph = keep_graph or not self.can_hand_over
        return None if keep_graph and self._compiled else partial(self._gradient, loss, keep_graph)

    def _gradient(self, loss: Tensor, keep_graph: bool, names: Collection[str]) -> Gradients:
        if not loss.requires_grad:
            return dict.fromkeys(names)
        if keep_graph or self._gradients is None:  # an estimator may ask twice, and a graph that is let go is gone
            self._leaves = [self._variables[name] for name in names] if keep_graph else graph_leaves(loss)
            self._gradients = list(torch.autograd.grad(loss, self._leaves, retain_graph=keep_graph, allow_unused=True))
        found = {id(leaf): g for leaf, g in zip(self._leaves, self._gradients, strict=True)}
        return {name: self._cast(found.get(id(self._variables[name]))) for name in names}

    def handed_over(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is known: its backward hands that on, where it may."""
        if self._gradients is None or not self.can_hand_over:
            return loss
        return hand_over(loss, self._leaves, self._gradients)
