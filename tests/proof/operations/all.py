"""Every operation, by name."""

from tests.proof.operations import (  # noqa: F401
    custom,
    derivatives,
    detached,
    indexing,
    linear_algebra,
    networks,
    norms,
    pointwise,
    random,
    sparse,
    spatial,
    spectral,
)
from tests.proof.registry import OPERATIONS

__all__ = ["OPERATIONS"]
