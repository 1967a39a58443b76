"""`IdentityJacobian`: the hypergradient of K inner steps without the inner Hessian."""

from dataclasses import dataclass
from typing import ClassVar

from metakd.estimators.mixed import mixed_alone
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.walk import walk_back


@dataclass(frozen=True)
class IdentityJacobian:
    r"""An approximation for K > 1 that ignores how a step's gradient depends on the step's start.

    $$\frac{d\, \mathrm{outer}}{d \phi} \approx \sum_{t=0}^{K-1} \nabla^2_{\phi\theta}\, \mathrm{inner}(\theta_t)\; u_t,
      \qquad \lambda_t = \left(\frac{\partial F}{\partial (\theta_t, s_t)}\right)^{\!\top} \lambda_{t+1},$$

    with `Adjoint`'s $F$ and $u_t$, but without its $\nabla^2_{\theta\theta}\, \mathrm{inner}\; u_t$: each step costs
    one mixed product instead of a rebuilt graph and a double backward. For K = 1 it is exact; for more steps its
    relative error is of the order of learning rate x curvature x K. Source: T1-T2 (Luketina et al., ICML 2016); SAMA
    (Choe et al., NeurIPS 2023) does so for adaptive optimizers. Ours differs in following the optimizer exactly:
    momentum, decay and Adam's state carry the adjoints back, and only the Hessian is dropped.

    Raises:
        MetaKDError: when called without a batch.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=IdentityJacobian())
        >>> result.gradient["phi"]  # -0.1 (theta_0 + theta_1); the exact one is -0.16
        tensor(-0.1800)
    """

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        return walk_back(problem, len(problem.batches), first=mixed_alone(), later=mixed_alone(), params_gradient=False)

    takes_shards: ClassVar[bool] = True

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return steps <= 1
