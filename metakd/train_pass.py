"""The real training forward pass, and the gradient that the lookahead takes from its graph."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakd.batch import Batch, tensors
from metakd.calling import call
from metakd.estimators.derivatives import Gradients
from metakd.handover import graph_leaves, hand_over
from metakd.kernels import compiled_parts
from metakd.replay import Product, recorded
from metakd.student import FunctionalStudent


class TrainPass:
    """One forward pass of the student itself: it updates batch statistics and draws random numbers.

    The gradient of a loss on its outputs is taken without touching `.grad` and without running the hooks that the user
    registered on parameters; where nothing stands in the way, the same gradient serves the user's `loss.backward()`.

    Args:
        student: the module the user trains, wrappers included.
        functional: the same student as a function.
        batch: the training batch.
        record: keep the products for a forward-mode pass over the same batch.

    Example:
        >>> student = nn.Linear(2, 1, bias=False)
        >>> train = TrainPass(student, FunctionalStudent(student), Batch(torch.ones(1, 2)))
        >>> train.gradient_of(train.outputs.sum(), keep_graph=False)()
        {'weight': tensor([[1., 1.]])}
        >>> train.handed_over(train.outputs.sum()).backward()
        >>> student.weight.grad
        tensor([[1., 1.]])
    """

    def __init__(
        self, student: nn.Module, functional: FunctionalStudent, batch: Batch, *, record: bool = False
    ) -> None:
        self._variables = functional.trainable()
        self._hooked = any(p._backward_hooks for p in self._variables.values())
        self._upstream = any(t.requires_grad for t in tensors((batch.inputs, batch.targets)))
        self._compiled = bool(compiled_parts(student))
        self._device = next(iter(self._variables.values())).device.type
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor | None] | None = None
        self.tape: Sequence[Product] = ()
        if self._hooked:
            # Gradients taken at a view of a parameter do not run the parameter's hooks; the real backward does.
            self._variables = {name: p.view_as(p) for name, p in self._variables.items()}
            forward = partial(call, functional.module, batch.inputs, dict(self._variables))
        else:
            forward = partial(call, student, batch.inputs)
        if record and not self._compiled:
            with recorded() as self.tape:
                self.outputs: Any = forward()
        else:
            self.outputs = forward()

    @property
    def can_hand_over(self) -> bool:
        """Whether the gradient may stand in for the real backward pass: exact, and with no one else to notice."""
        # A gradient scaler lifts half precision out of underflow by scaling the loss before the backward pass.
        half = torch.is_autocast_enabled(self._device) and torch.get_autocast_dtype(self._device) == torch.float16
        return not (self._hooked or self._upstream or half)

    def gradient_of(self, loss: Tensor, *, keep_graph: bool) -> Callable[[], Gradients] | None:
        """Gives the gradient of the loss by parameter name, None for parameters that it does not reach.

        None in place of the function where the user's backward pass needs the graph again and compiled code lets it go
        after the first.
        """
        keep_graph = keep_graph or not self.can_hand_over
        return None if keep_graph and self._compiled else partial(self._gradient, loss, keep_graph)

    def _gradient(self, loss: Tensor, keep_graph: bool) -> Gradients:
        if not loss.requires_grad:
            return dict.fromkeys(self._variables)
        self._leaves = list(self._variables.values()) if self._hooked else graph_leaves(loss)
        self._gradients = list(torch.autograd.grad(loss, self._leaves, retain_graph=keep_graph, allow_unused=True))
        found = {id(leaf): g for leaf, g in zip(self._leaves, self._gradients, strict=True)}
        return {name: found.get(id(p)) for name, p in self._variables.items()}

    def handed_over(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is known: its backward hands that on, where it may."""
        if self._gradients is None or not self.can_hand_over:
            return loss
        return hand_over(loss, self._leaves, self._gradients)
