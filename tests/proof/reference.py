"""What must come out, without metakd: update rules written out, differences, and a plain double backward."""

from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor

from tests.estimators.problems import some_direction
from tests.proof.compose import Composed, Recipe

RATE, MOMENTUM, BETAS, ALPHA, EPS = 0.2, 0.8, (0.8, 0.9), 0.8, 5e-2
_TORCHOPT = {
    "sgd": lambda lr: torchopt.sgd(lr=lr),
    "momentum": lambda lr: torchopt.sgd(lr=lr, momentum=MOMENTUM, weight_decay=0.05),
    "adam": lambda lr: torchopt.adam(lr=lr, betas=BETAS, eps=EPS),
    "rmsprop": lambda lr: torchopt.rmsprop(lr=lr, alpha=ALPHA, eps=EPS),
}


def optimizer(recipe: Recipe) -> Any:
    """TorchOpt's, as `hypergradient` takes it."""
    rule = _TORCHOPT[recipe.rule]
    return (lambda m: rule(m["rate"])) if recipe.learned_rate else rule(RATE)


class DoubleBackward(NamedTuple):
    """By plain autograd through all steps: d outer / d phi, d outer / d theta_0, theta_K, the outer loss."""

    gradient: dict[str, Tensor]
    in_params: dict[str, Tensor]
    params: dict[str, Tensor]
    outer_loss: Tensor


def step(rule: str, lr: Any, p: Tensor, g: Tensor, state: Any, t: int) -> tuple[Tensor, Any]:
    """One parameter's step t."""
    if rule == "sgd":
        return p - lr * g, None
    if rule == "momentum":
        g = g + 0.05 * p
        state = g if state is None else MOMENTUM * state + g
        return p - lr * state, state
    if rule == "adam":
        m, v = state or (0.0, 0.0)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        return p - lr * m / (1 - BETAS[0] ** (t + 1)) / (_root(v / (1 - BETAS[1] ** (t + 1))) + EPS), (m, v)
    v = (0.0 if state is None else ALPHA * state) + (1 - ALPHA) * g**2
    return p - lr * g / (_root(v) + EPS), v


def _root(v: Tensor) -> Tensor:
    """A root whose derivative at zero is zero: where a gradient is exactly zero, its square moves in no direction."""
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


def parts(value: Tensor) -> Tensor:
    """Dense and real: a complex tensor's two parts in a last dimension."""
    value = value.to_dense() if value.is_sparse else value
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def vector(values: dict[str, Tensor]) -> Tensor:
    """All of the tensors' real numbers, in the order of the names."""
    return torch.cat([parts(values[name]).reshape(-1) for name in sorted(values)])


def sweep(problem: Composed, p: dict[str, Tensor], m: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """theta_K from theta_0, with the random numbers of one seed."""
    torch.manual_seed(problem.recipe.seed)
    states: dict[str, Any] = dict.fromkeys(p)
    for t, batch in enumerate(problem.batches):
        loss = problem.inner(p, m, batch)
        found = torch.autograd.grad(loss, list(p.values()), allow_unused=True, **options)
        for (name, value), g in zip(list(p.items()), found, strict=True):
            if g is not None:
                new, states[name] = step(
                    problem.recipe.rule, m.get("rate", RATE), parts(value), parts(g), states[name], t
                )
                p[name] = torch.view_as_complex(new) if value.is_complex() else new
            if not options:
                p[name] = p[name].detach().requires_grad_()
    return p


def after_steps(problem: Composed, m: dict[str, Tensor]) -> float:
    """The outer loss by first-order gradients alone."""
    p = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    return problem.outer(sweep(problem, p, m), m).item()


def differences(problem: Composed) -> tuple[dict[str, Tensor], float, float]:
    """A random direction, the slope along it by central differences, and by how much two step lengths disagree."""
    direction = some_direction({name: parts(m) for name, m in problem.meta_params.items()}, seed=1)
    for name, m in problem.meta_params.items():
        direction[name] = torch.view_as_complex(direction[name]) if m.is_complex() else direction[name]

    def slope(h: float) -> float:
        def value(k: int) -> float:
            moved = {name: m + k * h * direction[name] for name, m in problem.meta_params.items()}
            return after_steps(problem, moved)

        return (45 * (value(1) - value(-1)) - 9 * (value(2) - value(-2)) + value(3) - value(-3)) / (60 * h)

    coarse, fine = slope(1e-3), slope(2e-4)
    return direction, fine, abs(coarse - fine)


def double_backward(problem: Composed) -> DoubleBackward:
    """Raises what torch raises where an operation has no second derivative."""
    start = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    meta = {name: value.clone().requires_grad_() for name, value in problem.meta_params.items()}
    end = sweep(problem, dict(start), meta, create_graph=True)
    loss = problem.outer(end, meta)
    inputs = [*meta.values(), *start.values()]
    found = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    gradient, in_params = {name: next(found) for name in meta}, {name: next(found) for name in start}
    return DoubleBackward(gradient, in_params, {name: p.detach() for name, p in end.items()}, loss.detach())
