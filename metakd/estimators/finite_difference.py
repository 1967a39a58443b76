"""`FiniteDifference`: hypergradients from first-order gradients alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.estimators.derivatives import Gradients, in_both, leaves
from metakd.estimators.problem import Hypergradient, Problem
from metakd.estimators.walk import walk_back
from metakd.inner import Params


@dataclass(frozen=True)
class FiniteDifference:
    r"""An approximation for models with neither forward-mode derivatives nor a double backward.

    `Adjoint`'s walk, with the products of $u$ and the inner loss's second derivatives by central differences of its
    gradient,

    $$\nabla^2\, \mathrm{inner}(\theta, \phi)\, u \approx \frac{\nabla\, \mathrm{inner}(\theta + h u, \phi) -
      \nabla\, \mathrm{inner}(\theta - h u, \phi)}{2 h}, \qquad h = \epsilon / \lVert u \rVert,$$

    in $\theta$ and in $\phi$ at once. The error is of the order of $\epsilon^2$ times the third derivatives, plus
    rounding of the order of the arithmetic's precision over $\epsilon$. Source: DARTS (Liu et al., ICLR 2019), for one
    step of SGD. Ours differs in taking any number of steps of any inner optimizer.

    Args:
        epsilon: the length of the step along u, in the units of the parameters.

    Raises:
        MetaKDError: an epsilon that is not a positive number; when called without a batch.

    Example:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=FiniteDifference())
        >>> result.gradient["phi"].round(decimals=4)  # the exact one is -0.16
        tensor(-0.1600)
    """

    epsilon: float = 1e-2

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, int | float) or not 0 < self.epsilon < math.inf:
            raise MetaKDError(f"epsilon must be a positive number such as 0.01, got {self.epsilon!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        return walk_back(problem, len(problem.batches), first=self._products, later=self._products)

    def _products(
        self, problem: Problem, params: Params, meta: Params, batch: Any, u: Params
    ) -> tuple[Gradients, Gradients]:
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in u.values()]))
        if not bool(length):
            return {}, dict.fromkeys(meta)
        h = self.epsilon / length

        def gradient_at(step: Tensor) -> tuple[Gradients, Gradients]:
            theta = leaves({name: p + step * u[name] if name in u else p for name, p in params.items()})
            return in_both(problem.inner(theta, meta, batch), theta, meta)

        def slope(ahead: Gradients, behind: Gradients) -> Gradients:
            pairs = {name: (a, behind[name]) for name, a in ahead.items()}
            return {name: None if a is None or b is None else (a - b) / (2 * h) for name, (a, b) in pairs.items()}

        (ahead, meta_ahead), (behind, meta_behind) = gradient_at(h), gradient_at(-h)
        return slope(ahead, behind), slope(meta_ahead, meta_behind)
