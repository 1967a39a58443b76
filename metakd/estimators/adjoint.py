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
    keeps the parameters $\theta_t$, the optimizer's state $s_t$ and the gradient $g_t$ of each. Then the adjoint
    $\lambda_t$, the gradient of the outer loss in $(\theta_t, s_t)$, walks back: pulled through the update it gives the
    cotangent $u_t$ of $g_t$, and with step t's graph built anew, alone,

    $$u_t = \left(\frac{\partial F}{\partial g_t}\right)^{\!\top} \lambda_{t+1}, \qquad
      \lambda_t = \left(\frac{\partial F}{\partial (\theta_t, s_t)}\right)^{\!\top} \lambda_{t+1}
      + \big(\nabla^2_{\theta\theta}\, \mathrm{inner}\; u_t,\, 0\big), \qquad
      \frac{d\, \mathrm{outer}}{d \phi} = \sum_t \nabla^2_{\phi\theta}\, \mathrm{inner}\; u_t.$$

    The first step needs the mixed product alone: in a balancer that is `OneStep`'s forward-mode pass. Source: the
    low-memory reverse of Franceschi et al. (2017) and MixFlow-MG (arXiv 2505.00793). Ours differs in starting from the
    real optimizer's state, in its groups and skipped parameters, and in replaying random numbers, and in a balancer
    buffers, where a step is evaluated again. `Unroll` gives the same numbers to rounding.

    Args:
        mode: how the two products are taken where both are asked for. `"reverse"` and `"auto"` are a double backward,
            `"forward"` the tangents of a gradient taken with dual numbers, which was never faster where we measured.
        offload: where the $\theta_t$, $g_t$ and $s_t$ of the first sweep wait, as in `"cpu"`; None for where they are.

    Raises:
        MetaKDError: another mode; when called without a batch, or where the model lacks the mode's second
            derivatives.

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
        """Whether it is exact for that many inner steps."""
        return True
