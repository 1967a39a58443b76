"""What an inner optimizer is, and where TorchOpt comes in: its transformations are taken if it is installed."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from metakd.errors import MetaKDError

__all__ = ["GradientTransformation", "is_transformation", "require_torchopt"]

if TYPE_CHECKING:  # of TorchOpt's class, so that a user's type checker takes both
    from torchopt.base import GradientTransformation
else:

    class GradientTransformation(NamedTuple):
        """An inner optimizer as two pure functions, like TorchOpt's class, which is taken as well.

        Attributes:
            init: params -> state.
            update: (gradients, state, *, params, inplace) -> (what to add to the parameters, new state).

        Examples:
            >>> import torch
            >>> from metakd.inner import apply, own
            >>> def update(gradients, state, *, params=None, inplace=True):
            ...     return {name: None if g is None else -0.1 * g for name, g in gradients.items()}, state
            >>> sgd = own(GradientTransformation(lambda params: (), update))
            >>> apply(sgd, {"w": torch.tensor([2.0])}, (), {"w": torch.tensor([1.0])})[0]
            {'w': tensor([0.8000])}
        """

        init: Callable[[Any], Any]
        update: Callable[..., tuple[Any, Any]]


def is_transformation(found: object) -> bool:
    """Whether it is a transformation, ours or TorchOpt's; whoever has one of TorchOpt's has imported it."""
    torchopts = sys.modules.get("torchopt.base")
    return isinstance(found, GradientTransformation) or (
        torchopts is not None and isinstance(found, torchopts.GradientTransformation)
    )


def require_torchopt(what: str) -> None:
    """Raise unless TorchOpt is installed.

    Raises:
        MetaKDError: it is not.
    """
    try:
        import torchopt  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchopt":
            raise
        raise MetaKDError(f'{what} needs TorchOpt, an optional package: pip install "metakd[torchopt]"') from error
