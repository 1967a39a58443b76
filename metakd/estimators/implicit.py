"""`Implicit`: the hypergradient at an optimum of the inner loss, by the implicit function theorem."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metakd.derivatives import Gradients, added, filled, graph_gradients, leaves, second_order_gradients
from metakd.errors import MetaKDError
from metakd.estimators.problem import Hypergradient, Problem, answer
from metakd.inner import Params, conjugate_gradient, neumann_series


@dataclass(frozen=True)
class Implicit:
    r"""The derivative of an optimum $\theta^*(\phi)$ of the inner loss, however it was reached.

    The K inner steps are taken first; they should end close to an optimum of $\mathrm{inner}$, the mean of the inner
    loss over the batches (a batch given several times is evaluated once). There its gradient is zero for every
    $\phi$, so

    $$\frac{d\, \mathrm{outer}}{d \phi} = \nabla_\phi\, \mathrm{outer} - \nabla^2_{\phi\theta}\, \mathrm{inner}\; q,
      \qquad (\nabla^2_{\theta\theta}\, \mathrm{inner} + \delta I)\, q = \nabla_\theta\, \mathrm{outer}.$$

    Time and memory do not depend on how many steps led there; each solver step is one product with the Hessian through
    one kept graph. The error has three parts: the distance to the optimum, what the solver leaves over, and the damping
    $\delta$. After n steps the solver's part falls like $((\sqrt\kappa - 1) / (\sqrt\kappa + 1))^n$ for conjugate
    gradients and like $(1 - 1/\kappa)^n$ for the Neumann series, with $\kappa$ the Hessian's condition number. Decay
    that the inner optimizer adds is not part of the loss: for L2 decay give it as damping.

    Source: iMAML (Rajeswaran et al., NeurIPS 2019) for conjugate gradients, Lorraine et al. (AISTATS 2020) for the
    Neumann series. The solvers are TorchOpt's; ours differs in refusing Hessians that are not positive definite.

    Args:
        solver: `"cg"` (conjugate gradients) or `"neumann"`.
        steps: products with the Hessian.
        damping: $\delta$.
        step_size: of the Neumann series; None for one over the largest curvature that five products find.

    Raises:
        MetaKDError: arguments out of range; a Hessian that is not positive definite; a model without second
            derivatives.

    Examples:
        >>> import torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor([0.0, 0.0])}, {"phi": torch.tensor([1.0, 2.0])}
        >>> result = hypergradient(
        ...     lambda p, m, batch: (torch.tensor([1.0, 4.0]) * p["w"] ** 2 / 2 - m["phi"] * p["w"]).sum(),
        ...     lambda p, m: p["w"].sum(),
        ...     w, phi, [None], optimizer=torchopt.sgd(lr=0.1), estimator=Implicit())
        >>> result.gradient["phi"]  # w* = (phi_1, phi_2 / 4)
        tensor([1.0000, 0.2500])
    """

    solver: Literal["cg", "neumann"] = "cg"
    steps: int = 20
    damping: float = 0.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("cg", "neumann"):
            raise MetaKDError(f"Implicit has the solvers 'cg' and 'neumann', not {self.solver!r}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise MetaKDError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < math.inf:
            raise MetaKDError(f"damping must be a number of at least 0, got {self.damping!r}")
        if self.step_size is not None:
            if self.solver == "cg":
                raise MetaKDError("conjugate gradients have no step_size; leave it out, or use solver='neumann'")
            if not isinstance(self.step_size, int | float) or not 0 < self.step_size < math.inf:
                raise MetaKDError(f"step_size must be a positive number or None, got {self.step_size!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        params, state = problem.sweep()
        outer_loss, v, total = problem.outer_gradients(params)
        theta, meta = leaves(params), leaves(problem.meta_params)
        found = graph_gradients(self._mean_inner_loss(problem, theta, meta), theta)
        g = {name: value for name, value in found.items() if value is not None}
        moved = {name: theta[name] for name in g}
        sizes = [p.numel() for p in moved.values()]

        def slope(q: Tensor) -> Tensor:
            """The inner loss's slope along q, a function of theta and phi."""
            parts = zip(g.values(), q.split(sizes), strict=True)
            return torch.stack([(value.flatten() * part).sum() for value, part in parts]).sum()

        def hessian_times(q: Tensor) -> Tensor:
            product = second_order_gradients(slope(q), moved, retain_graph=True)
            return _vector(problem.mean(product, moved, "a product with the Hessian"), moved)

        if any(v[name] is not None for name in moved):
            q = self._solve(hessian_times, _vector(v, moved))
            total = added(total, second_order_gradients(-slope(q), meta))
        return answer(problem, outer_loss, total, params, state)

    def _solve(self, matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        if self.solver == "cg":
            return conjugate_gradient(matvec, b, steps=self.steps, damping=self.damping)
        return neumann_series(matvec, b, steps=self.steps, damping=self.damping, step_size=self.step_size)

    @staticmethod
    def _mean_inner_loss(problem: Problem, theta: Params, meta: Params) -> Tensor:
        batches = list(problem.batches)
        steps = {id(batch): t for t, batch in enumerate(batches)}
        losses = [n * problem.inner_loss(theta, meta, steps[key]) for key, n in Counter(map(id, batches)).items()]
        return torch.stack(losses).sum() / len(batches)


def _vector(values: Gradients, like: Params) -> Tensor:
    return torch.cat([value.flatten() for value in filled(values, like).values()])
