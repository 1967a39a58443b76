"""`Adjoint`: the exact hypergradient of K inner steps with the graph of one step in memory at a time."""

from dataclasses import dataclass
from typing import Literal

import torch

from metakd.errors import MetaKDError
from metakd.estimators.mixed import mixed_alone
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.second_order import forward_over_reverse, reverse_over_reverse
from metakd.estimators.walk import walk_back


@dataclass(frozen=True)
class Adjoint:
    r"""Exact hypergradient of any number of inner steps; memory does not grow with their graphs.

    A first sweep takes the K steps $(\theta_{t+1}, s_{t+1}) = F(\theta_t, s_t, g_t)$ without second-order graphs and
    keeps each step's parameters $\theta_t$, optimizer state $s_t$ and gradient $g_t$. Then the adjoint $\lambda_t$, the
    gradient of the outer loss in $(\theta_t, s_t)$, walks back. Pulling it through the update gives the cotangent $u_t$
    of $g_t$; then step t's graph is rebuilt, alone, and

    $$u_t = \left(\frac{\partial F}{\partial g_t}\right)^{\!\top} \lambda_{t+1}, \qquad
      \lambda_t = \left(\frac{\partial F}{\partial (\theta_t, s_t)}\right)^{\!\top} \lambda_{t+1}
      + \big(\nabla^2_{\theta\theta}\, \mathrm{inner}\; u_t,\, 0\big), \qquad
      \frac{d\, \mathrm{outer}}{d \phi} = \sum_t \nabla^2_{\phi\theta}\, \mathrm{inner}\; u_t.$$

    The first step needs only the mixed product, which is `OneStep`'s forward-mode pass in a balancer. Source: the
    low-memory reverse of Franceschi et al. (2017) and MixFlow-MG (arXiv 2505.00793). Ours differs in starting from the
    real optimizer's state, in supporting its groups and skipped parameters, and in replaying random numbers (and a
    balancer's buffers) when it evaluates a step again. `Unroll` gives the same numbers to rounding.

    Args:
        mode: how to compute both products together. `"reverse"` and `"auto"` use a double backward, `"forward"` the
            tangents of a gradient with dual numbers, which was never faster in our measurements.
        offload: device for the $\theta_t$, $g_t$ and $s_t$ of the first sweep, such as `"cpu"`; None to leave them.

    Raises:
        MetaKDError: another mode; when called without a batch, or if the model lacks the mode's second derivatives.

    Examples:
        >>> import torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=Adjoint())
        >>> result.gradient["phi"]  # theta_2 = (1 - 0.1 phi)^2; d theta_2 / d phi = -0.2 (1 - 0.1 phi)
        tensor(-0.1600)
    """

    mode: Literal["reverse", "forward", "auto"] = "reverse"
    offload: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("reverse", "forward", "auto"):
            raise MetaKDError(f"Adjoint has the modes 'reverse', 'forward' and 'auto', not {self.mode!r}")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        later = forward_over_reverse if self.mode == "forward" else reverse_over_reverse
        return walk_back(problem, len(problem.batches), first=mixed_alone(), later=later, offload=self.offload)

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return True
