"""`Unroll`: the exact hypergradient of K inner steps by autograd through all of them."""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from metakd._autodiff import (
    added,
    graph_gradients,
    graph_nodes,
    joint_gradients,
    leaves,
    second_order_gradients,
    slope,
    with_zeros,
)
from metakd.errors import MetaKDError
from metakd.estimators.answer import answer
from metakd.estimators.curvature import twice_differentiable
from metakd.estimators.double_backward import reject_wrong_influence
from metakd.estimators.problem import NO_BATCHES, Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.second_order import reverse_over_reverse


@dataclass(frozen=True)
class Unroll:
    r"""Exact hypergradient of any number of inner steps; memory grows with K.

    Records the graph of $\theta_{t+1} = \theta_t + \mathrm{update}(\nabla_\theta\, \mathrm{inner}(\theta_t, \phi,
    b_t), s_t)$ for $t = 0 \dots K-1$, second-order terms and optimizer states included, and differentiates
    $\mathrm{outer}(\theta_K, \phi)$ through it: reverse-mode hyperparameter optimisation (Maclaurin et al., 2015;
    Franceschi et al., 2017). The steps are TorchOpt's functional optimizers, repaired (`metakd.inner`).

    Raises:
        MetaKDError: when called without a batch, in several processes, or where the model has no double backward.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(1.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"],
        ...     w, phi, [None, None], optimizer=torchopt.sgd(lr=0.1), estimator=Unroll())
        >>> result.gradient["phi"]  # theta_2 = (1 - 0.1 phi)^2; d theta_2 / d phi = -0.2 (1 - 0.1 phi)
        tensor(-0.1600)
    """

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        if not problem.batches:
            raise MetaKDError(NO_BATCHES)
        if not problem.whole:
            raise MetaKDError(
                "Unroll records one graph of all steps, which cannot span several processes; with "
                "DistributedDataParallel use estimators.Adjoint(), which is as exact"
            )
        if problem.memory.compare_products:
            _compare_first_step(problem)
        theta, meta, state = leaves(problem.params), leaves(problem.meta_params), problem.optimizer_state
        params, start = theta, theta if problem.wants_params_gradient else {}
        seen: set[Any] = set()
        for t in range(len(problem.batches)):
            loss = twice_differentiable(partial(problem.inner_loss, params, meta, t), seen)
            g = graph_gradients(loss, params)
            params, state = problem.step(g, state, params, meta)
            for p in params.values():  # no need to check the gradient's graph: it is right if the loss's is
                deque(graph_nodes(p, seen), maxlen=0)
        outer_loss, v, total = problem.outer_gradients(params)
        through_params, in_start = slope(params, v), dict.fromkeys(start)
        if through_params is not None:
            in_start, in_meta = joint_gradients(through_params, start, meta, second_order_gradients)
            total = added(total, in_meta)
        params_gradient = with_zeros(in_start, start) if problem.wants_params_gradient else None
        return answer(problem, outer_loss, total, params, state, params_gradient)

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return True


def _compare_first_step(problem: Problem) -> None:
    """Raise if the double backward is wrong in the first step."""
    along = {name: g for name, g in problem.inner_gradient(problem.params, 0).items() if g is not None}
    if not along:
        return
    reverse_over_reverse(problem, problem.params, leaves(problem.meta_params), problem.batches[0], along)
    if problem.weighted is not None and problem.memory.compare:
        problem.memory.compare = False
        reject_wrong_influence(problem, problem.params, problem.batches[0], along)
