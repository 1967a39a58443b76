"""Reverse mode through the terms alone, between a student's forward-mode pass and the terms' own parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metakd._autodiff import Gradients, gradients, reject_once_differentiable
from metakd._basics.nest import map_tensors
from metakd.inner import Params


class ThroughTerms:
    r"""The losses' tangents, and their derivatives in the terms' own parameters $\psi$, from one pass of the student.

    The terms read values z of the student's pass, outputs and others, with tangents $\dot z$. They run on leaves in
    place of the dual numbers, once, and a double backward through them gives for any cotangent c

    $$\sum_{ik} c_{ik}\, \dot\ell_{ik} = \Big\langle \nabla_z \sum_{ik} c_{ik}\, \ell_{ik}(z, \psi),\, \dot z
      \Big\rangle$$

    and its gradients in c and in $\psi$. Reverse mode through forward-mode tangents would not do: torch's formula of
    logsumexp cannot be differentiated.

    Args:
        learned: the terms' own parameters, as leaves.

    Examples:
        >>> tau, z = torch.tensor(2.0, requires_grad=True), torch.tensor([[1.0], [3.0]])
        >>> through = ThroughTerms({"tau": tau})
        >>> with forward_ad.dual_level():
        ...     outputs = forward_ad.make_dual(z, torch.ones_like(z))
        ...     _ = through(lambda z: tau * z**2, outputs)
        >>> through.product(torch.ones(2, 1))["tau"]  # of 2 tau (z_0 + z_1)
        tensor(8.)
    """

    def __init__(self, learned: Params) -> None:
        self._learned, self._read = learned, _OnLeaves()
        self._losses: Tensor | None = None

    def __call__(self, terms: Callable[[Any], Tensor], outputs: Any) -> Tensor:
        """The losses (B, M) of `terms`, as dual numbers."""
        leaves = map_tensors(self._read.stand_in, outputs)
        with self._read:
            losses = terms(leaves)
        self._losses = losses
        cotangent = torch.ones_like(losses, requires_grad=True)
        slope = self._slope(cotangent)
        tangent = None if slope is None else gradients(slope, {"c": cotangent}, retain_graph=True)["c"]
        return losses.detach() if tangent is None else forward_ad.make_dual(losses.detach(), tangent)

    def product(self, cotangent: Tensor, **options: Any) -> Gradients:
        """The gradient in the terms' own parameters of the cotangent's product with the losses' tangents."""
        assert self._losses is not None
        reject_once_differentiable(self._losses)
        slope = self._slope(cotangent)
        return dict.fromkeys(self._learned) if slope is None else gradients(slope, self._learned, **options)

    def _slope(self, cotangent: Tensor) -> Tensor | None:
        """The cotangent's product with the losses' tangents, with its graph."""
        assert self._losses is not None
        leaves, tangents = self._read.leaves, self._read.tangents
        combined = (cotangent * self._losses).sum()
        if not leaves or not combined.requires_grad:
            return None
        found = torch.autograd.grad(combined, leaves, create_graph=True, allow_unused=True)
        parts = [(g * t).sum() for g, t in zip(found, tangents, strict=True) if g is not None]
        return torch.stack(parts).sum() if parts else None


class _OnLeaves(TorchFunctionMode):
    """A block in which operations see a leaf of autograd in place of each dual number from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[Tensor] = []
        self.tangents: list[Tensor] = []
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def stand_in(self, value: Tensor) -> Tensor:
        """What replaces a tensor: itself if it has no tangent."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        primal, tangent = forward_ad.unpack_dual(value)
        if tangent is None:
            return value
        leaf = primal.detach().requires_grad_()
        self.leaves.append(leaf)
        self.tangents.append(tangent.detach())
        # Terms may write to a copy, but not to a leaf. The tensor itself is kept, as a new one could reuse its id.
        self._known[id(value)] = value, leaf.clone()
        return self._known[id(value)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map_tensors(self.stand_in, tuple(args)), **map_tensors(self.stand_in, dict(kwargs or {})))
