"""The student's own torch optimizers as differentiable ones."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metakd._autodiff import Params
from metakd._basics.together import scaled
from metakd.inner.groups import Optimizers, held_groups, required_rate
from metakd.inner.real import as_real
from metakd.inner.repaired import own, scales
from metakd.inner.rules import Group, Rule, State, rule_of
from metakd.inner.state import numbers_off_device, started
from metakd.inner.transformation import GradientTransformation


class InnerOptimizer(NamedTuple):
    """A differentiable optimizer and its initial state.

    Attributes:
        transformation: its `init` and `update`.
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
    """Gradient descent at each group's current learning rate, without momentum or weight decay.

    This is the lookahead of BiKD and of Meta-Weight-Net: theta' = theta - lr * g.

    Args:
        optimizer: the student's own optimizer, or several that hold its parameters together; read only.
        params: the student's trainable parameters, the very tensors that the optimizer holds.

    Returns:
        The optimizer; its state is empty.

    Raises:
        MetaKDError: the optimizer does not hold all of `params`, a parameter is held twice, or a group has no learning
            rate.

    Examples:
        >>> import torch
        >>> from metakd.inner import apply
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> inner = plain_sgd(torch.optim.Adam([w], lr=0.5), {"w": w})
        >>> apply(inner.transformation, {"w": torch.tensor([1.0])}, inner.state, {"w": w.detach()})[0]
        {'w': tensor([0.5000])}
    """
    rates = [(held.names, required_rate(held)) for held in held_groups(optimizer, params)]

    def update(
        updates: Any, state: tuple[()], *, params: Any = None, inplace: bool = True
    ) -> tuple[dict[str, Tensor | None], tuple[()]]:
        moved: dict[str, Tensor | None] = {name: None for names, _ in rates for name in names}
        for names, rate in rates:
            present = [name for name in names if updates[name] is not None]
            moved.update(zip(present, scaled([updates[name] for name in present], -rate), strict=True))
        return moved, state

    return InnerOptimizer(scales(GradientTransformation(lambda params: (), update)), ())


def mirror(optimizer: Optimizers, params: Params) -> InnerOptimizer:
    """Make the optimizer's own update rule, hyper-parameters and current state differentiable.

    Supports `torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`, `NAdam`, `RAdam` and `Muon`, with all of
    their flags and any number of parameter groups. With several optimizers, each moves its own parameters. K steps of
    the mirror equal K steps of the optimizer up to rounding. For Muon that is bfloat16 rounding: torch rounds its
    iteration to bfloat16, while the mirror uses the gradient's dtype, float32 or finer. As in torch.optim, a complex
    parameter is represented by its real view (`metakd.inner.as_real`), in gradients, parameters and states.

    Args:
        optimizer: the student's own optimizer, or several that hold its parameters together; read only.
        params: the student's trainable parameters, the very tensors that the optimizer holds.

    Returns:
        The optimizer, and the current state of each parameter by torch's own names. The state shares memory with the
        state of `optimizer`: use it before that optimizer's next step.

    Raises:
        MetaKDError: the optimizer or one of its flags is not supported, a group has no learning rate, the optimizer
            does not hold all of `params`, or a parameter is held twice.

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
