"""What an estimator returns."""

from typing import Any, NamedTuple

from torch import Tensor

from metakd.inner import Params


class Hypergradient(NamedTuple):
    """What an estimator returns; all tensors are detached.

    Attributes:
        outer_loss: the outer loss at the end of the inner steps, a scalar.
        gradient: its gradient in the meta-parameters, a dict like them.
        params: theta_K, the parameters after the inner steps.
        optimizer_state: the inner optimizer's state after them.
        params_gradient: the outer loss's gradient in theta_0, where the inner steps started, a dict like `params`; None
            if the estimator does not compute it.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> inner, outer = lambda p, m, batch: m["w"] * p["x"] ** 2, lambda p, m: p["x"] ** 2
        >>> start = {"x": torch.tensor(1.0)}, {"w": torch.tensor(0.5)}
        >>> found = hypergradient(inner, outer, *start, [None], optimizer=torchopt.sgd(lr=0.1))
        >>> found.gradient, found.params_gradient  # of ((1 - 0.2 w) x)^2
        ({'w': tensor(-0.3600)}, {'x': tensor(1.6200)})
    """

    outer_loss: Tensor
    gradient: Params
    params: Params
    optimizer_state: Any
    params_gradient: Params | None = None
