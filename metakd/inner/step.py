"""One differentiable step of an inner optimizer."""

from typing import Any

from metakd._autodiff import Gradients, Params
from metakd._basics.together import summed
from metakd.inner.transformation import GradientTransformation


def apply(optimizer: GradientTransformation, gradients: Gradients, state: Any, params: Params) -> tuple[Params, Any]:
    """Take one step, differentiable in gradients, state and parameters: theta' = theta + update(g, state, theta).

    A parameter whose gradient is None keeps its value and its state, as in torch.optim.

    Args:
        optimizer: the inner optimizer.
        gradients: of the inner loss, by the names of the parameters.
        state: the optimizer's.
        params: theta.

    Returns:
        theta' and the new state.

    Examples:
        >>> import torch, torchopt
        >>> sgd = torchopt.sgd(lr=0.1)
        >>> theta = {"w": torch.tensor([1.0])}
        >>> apply(sgd, {"w": torch.tensor([2.0])}, sgd.init(theta), theta)[0]
        {'w': tensor([0.8000])}
    """
    updates, state = optimizer.update(dict(gradients), state, params=params, inplace=False)
    moving = [name for name in params if updates[name] is not None]
    moved = summed([params[name] for name in moving], [updates[name] for name in moving])
    return {**params, **dict(zip(moving, moved, strict=True))}, state
