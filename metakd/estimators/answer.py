"""An estimator's results as its answer, known to say something."""

from typing import Any

from torch import Tensor

from metakd._autodiff import Gradients, filled
from metakd.batch import map_tensors
from metakd.errors import MetaKDError
from metakd.estimators.links import missing_link
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.inner import Params


def answer(
    problem: Problem,
    outer_loss: Tensor,
    gradient: Gradients,
    params: Params,
    optimizer_state: Any,
    params_gradient: Params | None = None,
) -> Hypergradient:
    """Detach the results, after making sure that the hypergradient says something.

    Zero is an answer, where the outer loss is connected to the meta-parameters.

    Raises:
        MetaKDError: the hypergradient is NaN or infinite, or nothing connects the two.
    """
    # Of a part nothing is no error: others add to it.
    if problem.whole and gradient and not any(g is not None and bool(g.any()) for g in gradient.values()):
        reason = missing_link(problem)
        if reason is not None:
            found = "None" if all(g is None for g in gradient.values()) else "zero"
            raise MetaKDError(f"the hypergradient is {found} for all meta-parameters {list(gradient)[:5]}: {reason}")
    if not gradient and params_gradient is None:
        raise MetaKDError(
            "meta_params is empty, and this estimator has no gradient in params: there is nothing to differentiate in. "
            "Give a meta-parameter, or use estimators.Adjoint()"
        )
    for name, g in gradient.items():
        if g is not None and not bool(g.isfinite().all()):
            raise MetaKDError(
                f"the hypergradient of {name!r} has {int((~g.isfinite()).sum())} NaN or infinite entries of "
                f"{g.numel()}; a square root, a norm or a power at zero in the inner loss or in its optimizer does "
                "that (add a small number under the root), as does an inner loss without second derivatives"
            )
    answers = outer_loss, filled(gradient, problem.meta_params), params, optimizer_state, params_gradient
    return Hypergradient(*map_tensors(Tensor.detach, answers))
