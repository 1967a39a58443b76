"""The choice of the inner optimizer."""

from metakd._autodiff import Params
from metakd.errors import MetaKDError
from metakd.inner.groups import Optimizers, held_groups
from metakd.inner.mirror import InnerOptimizer, mirror, plain_sgd
from metakd.inner.real import as_real
from metakd.inner.repaired import repaired
from metakd.inner.transformation import GradientTransformation, is_transformation


def inner_optimizer(choice: str | GradientTransformation, optimizer: Optimizers, params: Params) -> InnerOptimizer:
    """Build the differentiable optimizer of the virtual steps.

    Args:
        choice: `"sgd"` (`plain_sgd`), `"mirror"` (`mirror`) or a TorchOpt transformation, which is repaired and starts
            from its initial state.
        optimizer: the student's own torch optimizer, or several that hold its parameters together.
        params: the student's trainable parameters, the very tensors that the optimizer holds.

    Returns:
        The optimizer and its initial state.

    Raises:
        MetaKDError: the choice is unknown or cannot follow the optimizer, the optimizer does not hold `params`, or a
            parameter is held twice.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> inner_optimizer("mirror", torch.optim.Rprop([w]), {"w": w})
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: inner='mirror' cannot follow Rprop; it supports ...
    """
    if not isinstance(choice, str) and is_transformation(choice):
        held_groups(optimizer, params)  # raises unless it is the student's
        transformation = repaired(choice)
        return InnerOptimizer(transformation, transformation.init({n: as_real(p.detach()) for n, p in params.items()}))
    if choice == "mirror":
        return mirror(optimizer, params)
    if choice == "sgd":
        return plain_sgd(optimizer, params)
    raise MetaKDError(f"inner must be 'sgd', 'mirror' or a torchopt GradientTransformation, got {choice!r}")
