"""`Truncated`: the hypergradient through the last few of K inner steps."""

from dataclasses import dataclass

from metakd._basics.positive_int import positive_int
from metakd.estimators.mixed import mixed_alone
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.second_order import reverse_over_reverse
from metakd.estimators.walk import walk_back


@dataclass(frozen=True)
class Truncated:
    r"""The exact contribution of the last `horizon` inner steps; the earlier steps' share is omitted.

    $$\frac{d\, \mathrm{outer}}{d \phi} \approx \sum_{t = K - h}^{K - 1} \nabla^2_{\phi\theta}\,
      \mathrm{inner}(\theta_t)\; u_t$$

    with `Adjoint`'s $u_t$. It takes all K steps and walks back h of them. If each inner step contracts by a factor
    $\rho < 1$, the error falls like $\rho^h$; otherwise the omitted share may be large. Source: Shaban et al.,
    "Truncated Back-propagation for Bilevel Optimization" (AISTATS 2019). Ours differs in rebuilding graphs as `Adjoint`
    does.

    Args:
        horizon: h, the number of steps to walk back; K or more is exact.

    Raises:
        MetaKDError: a horizon below 1; see `Adjoint`.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=Truncated(1))
        >>> result.gradient["phi"]  # the last step alone: -0.1 theta_1 = -0.1 (1 - 0.1 phi)
        tensor(-0.0800)
    """

    horizon: int

    def __post_init__(self) -> None:
        positive_int(self.horizon, "horizon")

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        return walk_back(problem, self.horizon, first=mixed_alone(), later=reverse_over_reverse)

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return steps <= self.horizon
