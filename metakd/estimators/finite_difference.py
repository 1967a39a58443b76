"""`FiniteDifference`: hypergradients from first-order gradients alone."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metakd._autodiff import Gradients, gradients, joint_gradients, leaves, moved
from metakd.errors import MetaKDError
from metakd.estimators.problem import Problem, WeightedLosses
from metakd.estimators.result import Hypergradient
from metakd.estimators.verification import compare_influence
from metakd.estimators.walk import walk_back
from metakd.inner import Params


@dataclass(frozen=True)
class FiniteDifference:
    r"""A quick approximation, also for models with neither forward-mode derivatives nor a double backward.

    It is `Adjoint`'s walk, but computes products of $u$ with the inner loss's second derivatives by differences,

    $$\nabla^2\, \mathrm{inner}(\theta, \phi)\, u \approx \frac{\nabla\, \mathrm{inner}(\theta + h u, \phi) -
      \nabla\, \mathrm{inner}(\theta - h u, \phi)}{2 h}, \qquad h = \epsilon / \lVert u \rVert,$$

    in $\theta$ and in $\phi$ at once. The first step needs only the product in $\phi$, so its two sides are forward
    passes without a graph of the student. With one side, $\theta - h u$ and $2h$ become $\theta$ and $h$; the training
    pass already has the losses at $\theta$, so one forward pass replaces `OneStep`'s forward-mode pass. Both sides
    start with the buffers and random numbers of the training pass.

    The error is of the order of $\epsilon$ (one side) or $\epsilon^2$ (two sides) times a higher derivative, plus
    the rounding of the losses over $\epsilon$. Differences include paths that autograd cuts, such as `.detach()` or a
    straight-through estimator, so they may differ from the gradients that train the student; a balancer compares the
    two once and warns if they do. With the arithmetic's precision $\delta$ the default is
    $\epsilon = 3 \delta^{1/2}$ or $\delta^{1/3}$ (1e-3 or 5e-3 in float32), which minimises the sum of both errors for
    losses and derivatives of order one. A kink within $\epsilon$, as of ReLU, adds to the error. Over several steps
    the products' errors multiply: compare with `Adjoint` once. In half precision, autocast included, rounding
    swallows the difference. Source: DARTS
    (Liu et al., ICLR 2019), two sides and $\epsilon = 0.01$ for one step of SGD. Ours differs in $\epsilon$, in the
    one side, and in taking any number of steps of any inner optimizer.

    Args:
        epsilon: the length of the step along u, in the units of the parameters; None for the default.
        sides: 2, or 1 for a single inner step.

    Raises:
        MetaKDError: epsilon is not a positive number, or so small that no parameter moves; sides is neither 1 nor 2;
            when called without a batch, or with one side and several batches.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=FiniteDifference())
        >>> result.gradient["phi"].round(decimals=4)  # the exact one is -0.16
        tensor(-0.1600)
    """

    epsilon: float | None = None
    sides: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (isinstance(self.epsilon, int | float) and 0 < self.epsilon < math.inf):
            raise MetaKDError(f"epsilon must be a positive number such as 0.01, or None, got {self.epsilon!r}")
        if self.sides not in (1, 2):
            raise MetaKDError(f"FiniteDifference has 1 or 2 sides, not {self.sides!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        if self.sides == 1 and len(problem.batches) > 1:
            raise MetaKDError(
                f"FiniteDifference(sides=1) is for one inner step, got {len(problem.batches)} batches; use sides=2"
            )
        return walk_back(problem, len(problem.batches), first=self._in_meta, later=self._in_both, params_gradient=False)

    needs_second_derivatives: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = True

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return False

    def _in_meta(
        self, problem: Problem, params: Params, meta: Params, batch: Any, u: Params
    ) -> tuple[Gradients, Gradients]:
        h = self._step(problem, u)
        if problem.weighted is not None and problem.memory.compare:
            problem.memory.compare = False
            self._compare(problem, problem.weighted.at(problem.meta_params), params, batch, u, h)

        def side(step: Tensor) -> Gradients:
            there = _moved(problem, params, u, step)
            try:
                return gradients(problem.inner(there, meta, batch), meta)
            except RuntimeError:  # a loss may itself take gradients in the parameters, which needs leaves
                return gradients(problem.inner(leaves(there), meta, batch), meta)

        ahead = side(h)
        if self.sides == 2:
            return {}, _slope(ahead, side(-h), 2 * h)
        here = problem.inner(params, meta, batch) if problem.first_inner is None else problem.first_inner(meta)
        return {}, _slope(ahead, gradients(here, meta), h)

    def _in_both(
        self, problem: Problem, params: Params, meta: Params, batch: Any, u: Params
    ) -> tuple[Gradients, Gradients]:
        h = self._step(problem, u)
        sides = []
        for step in (h, -h):
            theta = leaves(_moved(problem, params, u, step))
            sides.append(joint_gradients(problem.inner(theta, meta, batch), theta, meta))
        (ahead, meta_ahead), (behind, meta_behind) = sides
        return _slope(ahead, behind, 2 * h), _slope(meta_ahead, meta_behind, 2 * h)

    def _compare(
        self, problem: Problem, weighted: WeightedLosses, params: Params, batch: Any, u: Params, h: Tensor
    ) -> None:
        """Warn if the losses' differences are not their derivatives."""
        if not bool(h):
            return
        with torch.no_grad():
            ahead = weighted.losses(_moved(problem, params, u, h), batch)
            behind = weighted.losses(_moved(problem, params, u, -h) if self.sides == 2 else params, batch)
        found = compare_influence(problem, params, batch, u, (ahead - behind) / (self.sides * h), limit=_TOLERANCE)
        if found is not None:
            warnings.warn(
                f"FiniteDifference differs from autograd: {found}. It takes differences of the losses, and "
                "straight-through estimators, .detach(), kinks such as ReLU's or rounding in half precision make these "
                "unlike gradients; if the model can be differentiated twice, use estimators.OneStep()",
                stacklevel=3,
            )

    def _step(self, problem: Problem, u: Params) -> Tensor:
        """The step size h; zero if u is zero."""
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in u.values()]))
        length = problem.norm(length, "the length of a step")
        precision = torch.finfo(length.dtype).eps
        epsilon = self.epsilon or (3 * precision ** (1 / 2) if self.sides == 1 else precision ** (1 / 3))
        return torch.where(length > 0, epsilon / length, 0.0)


def _moved(problem: Problem, params: Params, u: Params, h: Tensor) -> Params:
    there = moved(params, u, h)
    if bool(h) and not bool(problem.norm(_any_moves(params, there, u), "a moved pass")):
        raise MetaKDError(
            f"epsilon is lost in the rounding of {next(iter(u.values())).dtype}: no parameter moves; give a larger one "
            "or None"
        )
    return there


def _any_moves(params: Params, there: Params, u: Params) -> Tensor:
    """1 if an entry of this process's part moves, else 0."""
    return torch.tensor(float(not all(torch.equal(there[name], params[name]) for name in u)))


def _slope(ahead: Gradients, behind: Gradients, distance: Tensor) -> Gradients:
    pairs = {name: (a, behind[name]) for name, a in ahead.items()}
    distance = torch.where(distance > 0, distance, 1.0)  # for u = 0 both sides are equal
    return {name: None if a is None or b is None else (a - b) / distance for name, (a, b) in pairs.items()}


_TOLERANCE = 0.2  # generous, as differences have errors of their own
