"""Small random bilevel problems, and what must come out of them, written without TorchOpt and metakd.

A one-hidden-layer student is trained on the weighted mean of M per-sample losses and a penalty; a linear
model with sigmoids turns each sample's features into M weights. `double_backward` unrolls the inner steps
with update rules written out here, `central_differences` runs torch.optim.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import assume
from torch import Tensor

from metakd.batch import map_tensors


class Cube(torch.autograd.Function):
    """x^3, differentiable in both modes; others override what they get wrong."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


SGD: dict[str, Any] = {
    "kind": "sgd",
    "lr": 0.3,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
}
ADAM: dict[str, Any] = {"kind": "adam", "lr": 0.1, "betas": (0.8, 0.95), "eps": 5e-2, "weight_decay": 0.0}
RULES: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "sgd with decay": {**SGD, "weight_decay": 0.1},
    "momentum": {**SGD, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {**SGD, "momentum": 0.8, "nesterov": True},
    "adam": {**ADAM, "weight_decay": 0.1},
    "adamw": {**ADAM, "kind": "adamw", "weight_decay": 0.2},
    "clip, adam": {**ADAM, "clip": 0.2},
    "clip, momentum": {**SGD, "momentum": 0.9, "clip": 0.2},
}


def transformation(rule: dict[str, Any]) -> Any:
    """A fresh TorchOpt transformation."""
    options = {name: value for name, value in rule.items() if name not in ("kind", "clip")}
    made = {"sgd": torchopt.sgd, "adam": torchopt.adam, "adamw": torchopt.adamw}[rule["kind"]](**options)
    return torchopt.chain(torchopt.clip_grad_norm(max_norm=rule["clip"]), made) if "clip" in rule else made


def torch_optimizer(rule: dict[str, Any], params: list[Tensor]) -> torch.optim.Optimizer:
    options = {name: value for name, value in rule.items() if name not in ("kind", "clip")}
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[rule["kind"]](
        params, **options
    )


def step(rule, params, grads, state, t):
    """Step t of a rule on lists, differentiable; the state is a list of the parameters' own buffers."""
    present = [g for g in grads if g is not None]
    if "clip" in rule and present:
        norm = sum(g.pow(2).sum() for g in present).sqrt()
        if norm > rule["clip"]:
            grads = [None if g is None else g * rule["clip"] / (norm + 1e-6) for g in grads]
    new, new_state = [], []
    for p, g, buffers in zip(params, grads, state or [None] * len(params), strict=True):
        if g is None:
            new.append(p)
            new_state.append(buffers)
        elif rule["kind"] == "sgd":
            d = g + rule["weight_decay"] * p
            b = d if buffers is None else rule["momentum"] * buffers + (1 - rule["dampening"]) * d
            new.append(p - rule["lr"] * (d + rule["momentum"] * b if rule["nesterov"] else b))
            new_state.append(b if rule["momentum"] else None)
        else:
            decoupled = rule["kind"] == "adamw"
            d = g if decoupled else g + rule["weight_decay"] * p
            m, v = (torch.zeros_like(p), torch.zeros_like(p)) if buffers is None else buffers
            (b1, b2), lr = rule["betas"], rule["lr"]
            m, v = b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d**2
            direction = m / (1 - b1 ** (t + 1)) / ((v / (1 - b2 ** (t + 1))).sqrt() + rule["eps"])
            new.append((p * (1 - lr * rule["weight_decay"]) if decoupled else p) - lr * direction)
            new_state.append((m, v))
    return new, new_state


def _cross_entropy(z, y):
    return -(z.log_softmax(1) * y.softmax(1)).sum(1)


LOSSES = (
    _cross_entropy,
    lambda z, y: (z - y).pow(2).sum(1),
    lambda z, y: (z - y).cosh().log().sum(1),
    lambda z, y: F.softplus(z * y).mean(1),
    lambda z, y: (z.sin() * y).sum(1).exp(),
)


class Expected(NamedTuple):
    outer_loss: Tensor
    gradient: dict[str, Tensor]
    params: dict[str, Tensor]
    state: Any


@dataclass(frozen=True)
class Bilevel:
    """A drawn problem. `steps` is K; `frozen` keeps the first layer out of the parameters."""

    batch_size: int = 3
    losses: int = 2
    steps: int = 1
    rule: str = "sgd"
    frozen: bool = False
    unused: bool = False
    direct: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float64
    constants: dict[str, Tensor] = field(init=False, default_factory=dict)
    params: dict[str, Tensor] = field(init=False, default_factory=dict)
    meta_params: dict[str, Tensor] = field(init=False, default_factory=dict)
    batches: list[tuple[Tensor, ...]] = field(init=False, default_factory=list)
    meta_batch: tuple[Tensor, ...] = field(init=False, default=())

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        layers = {"w10.weight": draw(4, 3), "w10.bias": draw(4), "w2": draw(2, 4), "scale": draw(())}
        for name, value in layers.items():
            (self.constants if self.frozen and name.startswith("w10") else self.params)[name] = value
        if self.unused:
            self.params["unused"] = draw(2)
        self.meta_params.update(mix=draw(self.losses, 2), offset=draw(self.losses))
        self.batches.extend(
            (draw(self.batch_size, 3), draw(self.batch_size, 2), draw(self.batch_size, 2)) for _ in range(self.steps)
        )
        object.__setattr__(self, "meta_batch", (draw(4, 3), draw(4, 2)))

    def outputs(self, params, x):
        p = {**self.constants, **params}
        return (1 + 0.1 * p["scale"]) * (x @ p["w10.weight"].T + p["w10.bias"]).tanh() @ p["w2"].T

    def inner(self, params, meta_params, batch):
        x, y, features = batch
        z = self.outputs(params, x)
        losses = torch.stack([loss(z, y) for loss in LOSSES[: self.losses]], 1)
        weights = (features @ meta_params["mix"].T + meta_params["offset"]).sigmoid()
        # The penalty keeps clipped and normalised steps sensitive to the weights of a single loss.
        penalty = sum(p.pow(2).sum() for name, p in params.items() if name != "unused")
        return (weights * losses).sum(1).mean() + 0.1 * penalty

    def outer(self, params, meta_params):
        x, y = self.meta_batch
        loss = _cross_entropy(self.outputs(params, x), y).mean()
        return loss + (meta_params["mix"].pow(2).sum() + meta_params["offset"].sin().sum() if self.direct else 0.0)

    def arguments(self):
        """The positional arguments of `hypergradient`."""
        return self.inner, self.outer, self.params, self.meta_params, self.batches

    def torchopt(self):
        return transformation(RULES[self.rule])

    def double_backward(self, state=None, first_step=0):
        """The hypergradient by plain double backward through the steps of `step`."""
        names = list(self.params)
        params = [p.clone().requires_grad_() for p in self.params.values()]
        meta = {name: p.clone().requires_grad_() for name, p in self.meta_params.items()}
        for t, batch in enumerate(self.batches, start=first_step):
            loss = self.inner(dict(zip(names, params, strict=True)), meta, batch)
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            params, state = step(RULES[self.rule], params, grads, state, t)
        loss = self.outer(dict(zip(names, params, strict=True)), meta)
        found = torch.autograd.grad(loss, list(meta.values()))
        detached = {name: p.detach() for name, p in zip(names, params, strict=True)}
        return Expected(loss.detach(), dict(zip(meta, found, strict=True)), detached, map_tensors(Tensor.detach, state))

    def after_torch_steps(self, meta_params):
        """The outer loss after K steps of torch.optim."""
        params = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        optimizer = torch_optimizer(RULES[self.rule], list(params.values()))
        for batch in self.batches:
            optimizer.zero_grad()
            self.inner(params, meta_params, batch).backward()
            if "clip" in RULES[self.rule]:
                torch.nn.utils.clip_grad_norm_(list(params.values()), RULES[self.rule]["clip"])
            optimizer.step()
        return self.outer(params, meta_params).item()


def central_differences(function, at, direction, h=2e-3):
    """The derivative along a direction (a dict like `at`), to the order h^6."""

    def difference(k):
        ahead = {name: value + k * h * direction[name] for name, value in at.items()}
        behind = {name: value - k * h * direction[name] for name, value in at.items()}
        return function(ahead) - function(behind)

    return (45 * difference(1) - 9 * difference(2) + difference(3)) / (60 * h)


def assert_slope(gradient, problem, tolerance=1e-6):
    """A hypergradient against central differences along a direction, relative to its own norm."""
    direction, norm = some_direction(problem.meta_params), flat(gradient).norm().item()
    coarse, slope = (
        central_differences(problem.after_torch_steps, problem.meta_params, direction, h) for h in (1e-3, 2e-4)
    )
    # Adam's |g| has a kink where a gradient changes its sign; differences across it say little.
    assume(abs(coarse - slope) < 0.2 * tolerance * norm)
    assert abs((flat(gradient) * flat(direction)).sum().item() - slope) < tolerance * norm


def some_direction(like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in like.items()}
    norm = sum(d.pow(2).sum() for d in drawn.values()).sqrt()
    return {name: d / norm for name, d in drawn.items()}


def flat(values):
    return torch.cat([values[name].reshape(-1).double() for name in sorted(values)])


def relative(found, expected):
    """|found - expected| / |expected| over all tensors of two dicts."""
    return ((flat(found) - flat(expected)).norm() / flat(expected).norm()).item()


def problems(**fixed):
    """Problems of every batch size, number of losses, rule and flag; `fixed` ones as given."""
    drawn = {
        "batch_size": st.integers(1, 4),
        "losses": st.integers(1, len(LOSSES)),
        "rule": st.sampled_from(sorted(RULES)),
        "frozen": st.booleans(),
        "unused": st.booleans(),
        "direct": st.booleans(),
        "seed": st.integers(0, 2**31 - 1),
    }
    return st.builds(Bilevel, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


def most_kept(action):
    """The most bytes that autograd held at once during a call."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.nbytes
            alive += self.size
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        action()
    return peak
