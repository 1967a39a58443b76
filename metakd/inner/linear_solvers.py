"""Linear systems A x = b with a symmetric A that is known by its products, by TorchOpt's solvers."""

from collections.abc import Callable

import torch
from torch import Tensor

from metakd.errors import MetaKDError
from metakd.inner.transformation import require_torchopt

MatVec = Callable[[Tensor], Tensor]

_POWER_ITERATIONS = 5


def conjugate_gradient(matvec: MatVec, b: Tensor, *, steps: int, damping: float) -> Tensor:
    """Solve (A + damping I) x = b by conjugate gradients.

    If the matrix is not positive definite, TorchOpt's solver returns meaningless numbers or divides by zero; this
    function raises. It stops early at the precision of the dtype.

    Args:
        matvec: v -> A v, vectors.
        b: (N,).
        steps: the largest number of iterations, one product each.
        damping: added to the diagonal.

    Returns:
        x, (N,).

    Raises:
        MetaKDError: A + damping I is not positive definite along a direction that the solver met.

    Examples:
        >>> a = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> conjugate_gradient(lambda v: a @ v, torch.ones(2), steps=2, damping=0.0)
        tensor([0.5000, 0.2500])
    """

    def checked(v: Tensor) -> Tensor:
        if not bool(v.any()):
            return torch.zeros_like(v)  # the solver starts at A x0 with x0 = 0
        product = matvec(v)
        curvature = float(v @ product) / float(v @ v)
        if not curvature + damping > 0:
            raise MetaKDError(
                f"conjugate gradients met curvature {curvature:.3g} (damping {damping:.3g}): the inner loss has no "
                f"minimum there. Set a damping above {abs(curvature):.3g}, or take more inner steps first"
            )
        return product

    require_torchopt("Implicit(solver='cg')")
    from torchopt.linear_solve import solve_cg

    tolerance = torch.finfo(b.dtype).eps ** 0.75
    found: Tensor = solve_cg(ridge=damping, maxiter=steps, rtol=tolerance)(checked, b)
    return found


def neumann_series(matvec: MatVec, b: Tensor, *, steps: int, damping: float, step_size: float | None) -> Tensor:
    """Approximate (A + damping I)^-1 b by the sum over j = 0 ... steps of a (I - a (A + damping I))^j b.

    Args:
        matvec: v -> A v, vectors.
        b: (N,).
        steps: products with A.
        damping: added to the diagonal.
        step_size: a; None for one over the norm of A + damping I, estimated by a few more products (power iteration
            from b).

    Returns:
        The sum, (N,).

    Raises:
        MetaKDError: the series diverges.

    Examples:
        >>> a = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> neumann_series(lambda v: a @ v, torch.ones(2), steps=30, damping=0.0, step_size=0.25)
        tensor([0.5000, 0.2500])
    """
    norm = float(torch.linalg.vector_norm(b))
    if step_size is None:
        step_size = 1.0 / _largest_curvature(matvec, b, damping)

    def checked(term: Tensor) -> Tensor:
        # If 0 < a (A + damping I) < 2, the norms of the terms do not grow.
        if not float(torch.linalg.vector_norm(term)) <= 1.001 * norm:
            raise MetaKDError(
                f"the Neumann series with step_size={step_size:.3g} and damping={damping:.3g} diverges: the inner loss "
                "has no minimum there (set a larger damping, or take more inner steps first), or its curvature is "
                "above 2 / step_size (set a smaller one)"
            )
        return matvec(term)

    require_torchopt("Implicit(solver='neumann')")
    from torchopt.linear_solve import solve_inv

    found: Tensor = solve_inv(ns=True, ridge=damping, maxiter=steps, alpha=step_size)(checked, b)
    return found


def _largest_curvature(matvec: MatVec, b: Tensor, damping: float) -> float:
    v, norm = b, 1.0
    for _ in range(_POWER_ITERATIONS):
        v = v / torch.linalg.vector_norm(v)
        v = matvec(v) + damping * v
        norm = float(torch.linalg.vector_norm(v))
        if not norm > 0:
            raise MetaKDError("the inner loss is flat along the outer gradient; set a damping above 0")
    return norm
