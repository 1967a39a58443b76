"""The inner optimizer a user asks for by name, or brings along."""

import torch
from torchopt.base import GradientTransformation

from metakd.derivatives import Params
from metakd.errors import MetaKDError
from metakd.inner.mirror import InnerOptimizer, mirror, plain_sgd
from metakd.inner.repaired import repaired


def inner_optimizer(
    choice: str | GradientTransformation, optimizer: torch.optim.Optimizer, params: Params
) -> InnerOptimizer:
    """The differentiable optimizer of the virtual steps.

    Args:
        choice: `"sgd"` (`plain_sgd`), `"mirror"` (`mirror`) or a TorchOpt transformation, which starts from its
            initial state and is repaired.
        optimizer: the student's own torch optimizer.
        params: the student's trainable parameters, the very tensors the optimizer holds.

    Returns:
        The optimizer and the state it starts from.

    Raises:
        MetaKDError: another choice, or an optimizer that does not hold `params` or cannot be mirrored.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> inner_optimizer("mirror", torch.optim.RMSprop([w]), {"w": w})
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: inner='mirror' cannot follow RMSprop; it supports ...
    """
    if choice == "mirror":
        return mirror(optimizer, params)
    plain = plain_sgd(optimizer, params)
    if choice == "sgd":
        return plain
    if isinstance(choice, GradientTransformation):
        transformation = repaired(choice)
        detached = {name: p.detach() for name, p in params.items()}
        return InnerOptimizer(transformation, transformation.init(detached))
    raise MetaKDError(f"inner must be 'sgd', 'mirror' or a torchopt GradientTransformation, got {choice!r}")
