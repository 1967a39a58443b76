"""`Implicit`: the hypergradient at an optimum of the inner loss, by the implicit function theorem."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metakd._autodiff import Gradients, added, graph_gradients, leaves, second_order_gradients, slope, with_zeros
from metakd._basics.positive_int import positive_int
from metakd.errors import MetaKDError
from metakd.estimators.answer import answer
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.problem import Problem, Step
from metakd.estimators.result import Hypergradient
from metakd.inner import Params, conjugate_gradient, neumann_series


@dataclass(frozen=True)
class Implicit:
    r"""The derivative of an optimum $\theta^*(\phi)$ of the inner loss, however it was reached.

    The K inner steps come first; they should end close to an optimum of $\mathrm{inner}$, the mean of the inner loss
    over the batches. (Repeated batches are evaluated once: the same object, or an equal number, string or tuple of
    these.) At the optimum the gradient is zero for every $\phi$, so

    $$\frac{d\, \mathrm{outer}}{d \phi} = \nabla_\phi\, \mathrm{outer} - \nabla^2_{\phi\theta}\, \mathrm{inner}\; q,
      \qquad (\nabla^2_{\theta\theta}\, \mathrm{inner} + \delta I)\, q = \nabla_\theta\, \mathrm{outer}.$$

    Time and memory do not depend on the number of steps that led there; each solver step is one product with the
    Hessian. One batch keeps its graph; with several batches each product rebuilds their graphs one after the other.
    The error has three parts: the distance to the optimum, the solver's remaining error, and the damping $\delta$.
    After n steps the solver's part falls like $((\sqrt\kappa - 1) / (\sqrt\kappa + 1))^n$ for conjugate
    gradients and like $(1 - 1/\kappa)^n$ for the Neumann series, with $\kappa$ the Hessian's condition number.
    Weight decay of the inner optimizer is not part of the loss: pass L2 decay as damping.

    Source: iMAML (Rajeswaran et al., NeurIPS 2019) for conjugate gradients, Lorraine et al. (AISTATS 2020) for the
    Neumann series. The solvers are TorchOpt's; ours differs in refusing Hessians that are not positive definite.

    Args:
        solver: `"cg"` (conjugate gradients) or `"neumann"`.
        steps: products with the Hessian.
        damping: $\delta$.
        step_size: for the Neumann series; None for the inverse of the largest curvature, estimated by five products.

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
        positive_int(self.steps, "steps")
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < math.inf:
            raise MetaKDError(f"damping must be a number of at least 0, got {self.damping!r}")
        if self.step_size is not None:
            if self.solver == "cg":
                raise MetaKDError("conjugate gradients have no step_size; leave it out, or use solver='neumann'")
            if not isinstance(self.step_size, int | float) or not 0 < self.step_size < math.inf:
                raise MetaKDError(f"step_size must be a positive number or None, got {self.step_size!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        moved: set[str] = set()
        params, state = problem.sweep(lambda t, p, s, g: moved.update(n for n, v in g.items() if v is not None))
        outer_loss, v, total = problem.outer_gradients(params)
        curvature = _Curvature(problem, params, [name for name in params if name in moved])
        if any(v[name] is not None for name in moved):
            q = self._solve(curvature.hessian_times, curvature.vector(v))
            total = added(total, curvature.mixed_times(-q))
        return answer(problem, outer_loss, total, params, state)

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return False

    def _solve(self, matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        if self.solver == "cg":
            return conjugate_gradient(matvec, b, steps=self.steps, damping=self.damping)
        return neumann_series(matvec, b, steps=self.steps, damping=self.damping, step_size=self.step_size)


class _Curvature:
    """Products of vectors with the second derivatives of the mean inner loss.

    A single batch keeps its graph; for several batches each product rebuilds one graph after the other.
    """

    def __init__(self, problem: Problem, params: Params, names: list[str]) -> None:
        self._problem, self._params, self._meta = problem, leaves(params), leaves(problem.meta_params)
        self._names = names
        keys = [_key(batch.batch if isinstance(batch, Step) else batch) for batch in problem.batches]
        first = {key: t for t, key in reversed([*enumerate(keys)])}
        self._shares = {first[key]: number / len(keys) for key, number in Counter(keys).items()}
        self._kept: Gradients | None = None

    def hessian_times(self, q: Tensor) -> Tensor:
        """The product with the Hessian, averaged over processes."""
        product = self._product(q, self._moved)
        return self.vector(self._problem.of_all(product, self._moved))

    def mixed_times(self, q: Tensor) -> Gradients:
        """The product with the mixed derivative, in the meta-parameters."""
        return self._product(q, self._meta)

    def vector(self, values: Gradients) -> Tensor:
        """The values of the moving parameters as one vector."""
        return torch.cat([value.flatten() for value in with_zeros(values, self._moved).values()])

    @property
    def _moved(self) -> Params:
        return {name: self._params[name] for name in self._names}

    def _product(self, q: Tensor, into: Params) -> Gradients:
        """The gradient in `into` of the mean inner loss's slope along q."""
        sizes = [p.numel() for p in self._moved.values()]
        along = {n: part.view_as(self._params[n]) for n, part in zip(self._names, q.split(sizes), strict=True)}
        total: Gradients = dict.fromkeys(into)
        for t, share in self._shares.items():
            derivative = slope(self._gradient(t), along)
            if derivative is not None:
                kept = self._kept is not None
                total = added(total, second_order_gradients(share * derivative, into, retain_graph=kept))
        return total

    def _gradient(self, t: int) -> Gradients:
        """The inner gradient on the batch of step t, with its graph."""
        if self._kept is not None:
            return self._kept
        loss = twice_differentiable(lambda: self._problem.inner_loss(self._params, self._meta, t))
        found = graph_gradients(loss, self._moved)
        if len(self._shares) == 1:
            self._kept = found
        return found


def _key(batch: Any) -> Hashable:
    """A batch's identity: plain values by value, other objects by id."""
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return (tuple, *map(_key, batch))
    return (type(batch), batch) if isinstance(batch, str | bytes | int | float | None) else id(batch)
