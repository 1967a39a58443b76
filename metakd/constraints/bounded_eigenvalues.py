"""Symmetric matrices with eigenvalues within bounds, such as well-conditioned covariances."""

import math

import torch
from torch import Tensor, nn

from metakd.errors import MetaKDError


class BoundedEigenvalues(nn.Module):
    r"""Symmetric positive definite matrices with eigenvalues in (low, high), so a condition number below high / low.

    With $S$ the symmetric part of the free matrix, $m = \sqrt{\mathrm{low} \cdot \mathrm{high}}$ and
    $r = \log(\mathrm{high} / \mathrm{low}) / 2$,

    $$\Sigma = m \exp\big(r \tanh(S / r)\big),$$

    with functions of matrices: the eigenvectors stay, an eigenvalue $s$ becomes $m \exp(r \tanh(s / r))$. Far from the
    bounds $\Sigma$ is close to $m \exp(S)$. The derivatives of `eigh` are infinite or wrong where two eigenvalues meet.
    This map uses matrix exponentials and solves only, and has derivatives of any order everywhere, in forward and
    reverse mode.

    Shapes: `(..., n, n)`; a variance is `(..., 1, 1)`. Rounding errors are of the order of the dtype's precision times
    `high`: use float64 if `high / low` is above 1e5.

    Source: the constraints are those of Qadri, Manchester, Kaess (arXiv 2309.09718). The map is ours; it makes any
    unconstrained optimizer applicable.

    Args:
        low: lower bound of the eigenvalues, exclusive.
        high: upper bound, exclusive.

    Raises:
        MetaKDError: not 0 < low < high; in a call, matrices are not square or not finite; in `right_inverse`, the
            matrix is not symmetric or has eigenvalues out of bounds.

    Examples:
        >>> bounded = BoundedEigenvalues(0.01, 100.0)
        >>> bounded(torch.tensor([[1000.0, 0.0], [0.0, 0.0]])).round(decimals=3)
        tensor([[100.,   0.],
                [  0.,   1.]])
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not 0 < low < high < math.inf:
            raise MetaKDError(f"BoundedEigenvalues needs 0 < low < high, both finite, got low={low!r}, high={high!r}")
        self.low, self.high = float(low), float(high)
        self._middle = math.sqrt(self.low) * math.sqrt(self.high)
        self._reach = math.log(self.high / self.low) / 2

    def forward(self, free: Tensor) -> Tensor:
        """Return the bounded matrices, shape `(..., n, n)` like `free`."""
        _check_square(free)
        symmetric = (free + free.mT) / 2
        exponential: Tensor = torch.linalg.matrix_exp(self._reach * _tanh(symmetric / self._reach))
        return self._middle * exponential

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the symmetric free matrices that `forward` maps to `value`, same shape."""
        _check_square(value)
        if not torch.allclose(value, value.mT):
            raise MetaKDError("BoundedEigenvalues cannot start at a matrix that is not symmetric; use (a + a.mT) / 2")
        eigenvalues, vectors = torch.linalg.eigh(value)
        if not bool(((eigenvalues > self.low) & (eigenvalues < self.high)).all()):
            raise MetaKDError(
                f"BoundedEigenvalues({self.low:g}, {self.high:g}) cannot start at eigenvalues from "
                f"{eigenvalues.min().item():g} to {eigenvalues.max().item():g}: they must be strictly inside; widen "
                "the bounds, or choose another start"
            )
        free = self._reach * ((eigenvalues / self._middle).log() / self._reach).atanh()
        found: Tensor = (vectors * free.unsqueeze(-2)) @ vectors.mT
        return found

    def extra_repr(self) -> str:
        """Return the bounds, for `repr`."""
        return f"low={self.low:g}, high={self.high:g}"


def _tanh(matrix: Tensor) -> Tensor:
    """Hyperbolic tangent of symmetric matrices.

    Halves the matrix until it is small, then applies tanh(2x) = 2 tanh(x) / (1 + tanh(x)^2). So no exponential
    overflows, and small eigenvalues keep their digits beside large ones.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    norm = float(torch.linalg.matrix_norm(matrix.detach()).max()) if matrix.numel() else 0.0
    halvings = max(0, math.frexp(norm)[1])
    exponential = torch.linalg.matrix_exp(matrix * 2.0 ** (1 - halvings))
    found: Tensor = torch.linalg.solve(exponential + one, exponential - one)
    for _ in range(halvings):
        found = torch.linalg.solve(one + found @ found, 2 * found)
    return (found + found.mT) / 2  # removes rounding errors


def _check_square(matrix: Tensor) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise MetaKDError(
            f"BoundedEigenvalues takes square matrices (..., n, n), got {tuple(matrix.shape)}; "
            "pass a variance as (..., 1, 1)"
        )
    if not bool(matrix.isfinite().all()):
        raise MetaKDError("BoundedEigenvalues got entries that are NaN or infinite; lower the outer learning rate")
