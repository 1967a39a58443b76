"""The student's own torch optimizers as differentiable ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torchopt.base import GradientTransformation

from metakd.derivatives import Params
from metakd.inner.groups import Optimizers, held_groups, required_rate
from metakd.inner.real import as_real
from metakd.inner.repaired import own
from metakd.inner.rules import Group, Rule, State, rule_of
from metakd.inner.state import numbers_off_device, started


class InnerOptimizer(NamedTuple):
    """A differentiable optimizer and the state it starts from.

    Attributes:
        transformation: its `init` and `update`, as TorchOpt has them.
        state: of the parameters it was built for.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> transformation, state = mirror(torch.optim.SGD([w], lr=0.5, momentum=0.9), {"w": w})
        >>> transformation.update({"w": torch.ones(2)}, state, params={"w": w})[0]
        {'w': tensor([-0.5000, -0.5000])}
    """

    transformation: GradientTransformation
    state: Any


def plain_sgd(optimizer: Optimizers, params: Params) -> InnerOptimizer:
    """Gradient descent at the optimizer's current learning rates, one a group; no momentum, no decay.

    This is the lookahead of BiKD and of Meta-Weight-Net: theta' = theta - lr * g.

    Args:
        optimizer: the student's own optimizer, or several that hold its parameters together; read, never written.
        params: the student's trainable parameters, the very tensors the optimizer holds.

    Returns:
        The optimizer; its state is empty.

    Raises:
        MetaKDError: the optimizer does not hold all of `params`, two hold the same, or a group has no learning rate.

    Examples:
        >>> import torch
        >>> from metakd.inner import apply
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> inner = plain_sgd(torch.optim.Adam([w], lr=0.5), {"w": w})
        >>> apply(inner.transformation, {"w": torch.tensor([1.0])}, inner.state, {"w": w.detach()})[0]
        {'w': tensor([0.5000])}
    """
    rates = {name: required_rate(held) for held in held_groups(optimizer, params) for name in held.names}

    def update(
        updates: Any, state: tuple[()], *, params: Any = None, inplace: bool = True
    ) -> tuple[dict[str, Tensor | None], tuple[()]]:
        return {name: None if (g := updates[name]) is None else -rate * g for name, rate in rates.items()}, state

    return InnerOptimizer(own(GradientTransformation(lambda params: (), update)), ())


def mirror(optimizer: Optimizers, params: Params) -> InnerOptimizer:
    """The optimizer's own update rule, hyper-parameters and present state, made differentiable.

    Supported are `torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`, `NAdam`, `RAdam` and `Muon`, with all of
    their flags and any number of parameter groups; of several optimizers each moves its own parameters. K steps of the
    mirror are K steps of the optimizer, to rounding: that of bfloat16 for Muon, whose iteration torch rounds so, and
    which runs here in the gradient's own dtype, in float32 at least. Like torch.optim, the mirror knows a complex
    parameter as its real view (`metakd.inner.as_real`): gradients, parameters and states are those of the views.

    Args:
        optimizer: the student's own optimizer, or several that hold its parameters together; read, never written.
        params: the student's trainable parameters, the very tensors the optimizer holds.

    Returns:
        The optimizer, and the present state of each parameter by torch's own names. It shares memory with that of
        `optimizer`, whose next step ends its use.

    Raises:
        MetaKDError: another optimizer, an unsupported flag, a group without a learning rate, an optimizer that does
            not hold all of `params`, or two that hold the same.

    Examples:
        >>> import torch
        >>> from metakd.inner import apply
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> inner = mirror(torch.optim.SGD([w], lr=0.5, weight_decay=0.2), {"w": w})
        >>> apply(inner.transformation, {"w": torch.tensor([1.0])}, inner.state, {"w": w.detach()})[0]
        {'w': tensor([0.4000])}
    """
    rules: dict[str, tuple[Rule, Group]] = {}
    found: dict[str, Mapping[str, Any]] = {}
    for held in held_groups(optimizer, params):
        rule = rule_of(held)
        for name in held.names:
            rules[name], found[name] = rule, held.optimizer.state.get(params[name], {})

    def init(params: Params) -> dict[str, State]:
        return {name: started(as_real(params[name].detach()), {}, *rule) for name, rule in rules.items()}

    def update(
        updates: Any, state: dict[str, State], *, params: Any = None, inplace: bool = True
    ) -> tuple[dict[str, Tensor | None], dict[str, State]]:
        moved: dict[str, Tensor | None] = dict.fromkeys(rules)
        after = dict(state)
        for name, (rule, group) in rules.items():
            if (g := updates[name]) is not None:
                moved[name], after[name] = rule.step(g, params[name], state[name], group)
        return moved, after

    present = numbers_off_device(found)
    state = {name: started(as_real(params[name].detach()), present[name], *rule) for name, rule in rules.items()}
    return InnerOptimizer(own(GradientTransformation(init, update)), state)
