"""Where a gradient is exactly zero, the hypergradient is finite and equals central differences, whatever the optimizer.

The meta-parameters move three entries of `w` whose gradients are zero at every step, zero at the first step, and never
zero; a fourth entry is dead: no loss ever reaches it.
"""

import pytest
import torch
import torchopt
from torchopt.alias.utils import _set_use_chain_flat

from metakd import estimators, hypergradient
from metakd.inner import apply, mirror, repaired


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


START = f64(0.3, -0.2, 0.5, 0.7)
PHI = f64(0.5, 0.25, 0.8)


def inner(params, meta, batch):
    w, phi, still = params["w"], meta["phi"], params["w"] - START
    always = (phi[0] - 0.5) * w[0] + still[0] ** 2
    first = (phi[1] - 0.25) * w[1] + still[1] ** 2 + still[1] * still[2]
    return always + first + phi[2] * w[2].sin() + 0.0 * w[3]


def outer(params, meta):
    w = params["w"]
    return (w * f64(1.0, -2.0, 0.5, 1.0)).sum().sin() + w.square().sum()


def found(optimizer, steps, state=None, estimator=estimators.Unroll()):  # noqa: B008
    batches = [None] * steps
    params, meta = {"w": START}, {"phi": PHI}
    return hypergradient(
        inner, outer, params, meta, batches, optimizer=optimizer, optimizer_state=state, estimator=estimator
    ).gradient["phi"]


def slopes(after, h=1e-6):
    """Central differences of phi -> outer loss, extrapolated: where Adam divides by |g| the error is of first order."""

    def difference(step):
        moves = step * torch.eye(len(PHI), dtype=PHI.dtype)
        return torch.stack([(after(PHI + move) - after(PHI - move)) / (2 * step) for move in moves])

    return 2 * difference(h / 2) - difference(h)


def by_steps(step, steps):
    """phi -> the outer loss after steps by (w, gradient) -> w."""

    def after(phi):
        w = START
        for _ in range(steps):
            leaf = w.clone().requires_grad_()
            (g,) = torch.autograd.grad(inner({"w": leaf}, {"phi": phi}, None), leaf)
            w = step(w, g)
        return outer({"w": w}, {})

    return after


OPTIONS = {"lr": 0.1, "eps": 0.2}
FACTORIES = {
    "sgd": lambda: torchopt.sgd(lr=0.1, momentum=0.9),
    "adam": lambda: torchopt.adam(**OPTIONS),
    "adamw": lambda: torchopt.adamw(**OPTIONS),
    "adadelta": lambda: torchopt.adadelta(**OPTIONS),
    "adagrad": lambda: torchopt.adagrad(**OPTIONS),
    "adagrad with lr_decay": lambda: torchopt.adagrad(lr_decay=0.5, **OPTIONS),
    "adagrad with an accumulator": lambda: torchopt.adagrad(initial_accumulator_value=0.1, **OPTIONS),
    "adamax": lambda: torchopt.adamax(**OPTIONS),
    "radam": lambda: torchopt.radam(betas=(0.9, 0.95), **OPTIONS),
    "rmsprop": lambda: torchopt.rmsprop(**OPTIONS),
    "rmsprop with momentum": lambda: torchopt.rmsprop(momentum=0.9, nesterov=True, **OPTIONS),
    "centered rmsprop": lambda: torchopt.rmsprop(centered=True, **OPTIONS),
    "rmsprop with a scale": lambda: torchopt.rmsprop(initial_scale=1.0, **OPTIONS),
}
EXACT = {"rtol": 1e-6, "atol": 1e-8}
# TorchOpt rounds Adam's bias corrections and Adagrad's decay to float32.
TOLERANCE = {name: {"rtol": 1e-5, "atol": 1e-5} for name in ("adam", "adamw", "adagrad with lr_decay")}
NAN = {"adam", "adamw", "adagrad", "adagrad with lr_decay", "rmsprop", "rmsprop with momentum", "centered rmsprop"}


@pytest.fixture(params=[True, False], ids=["flat", "tree"])
def _flat(request):
    """TorchOpt's factories make chains of two kinds."""
    _set_use_chain_flat(request.param)
    yield
    _set_use_chain_flat(True)


def torchopt_slopes(build, steps):
    def after(phi):
        raw, params = build(), {"w": START}
        state = raw.init(params)

        def step(w, g):
            nonlocal state
            moved, state = apply(raw, {"w": g}, state, {"w": w})
            return moved["w"]

        return by_steps(step, steps)(phi)

    return slopes(after)


@pytest.mark.usefixtures("_flat")
@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("name", FACTORIES)
def test_every_factory_of_torchopt(name, steps):
    """Its values are TorchOpt's own; with 8 steps RAdam's last ones are rectified."""
    expected = torchopt_slopes(FACTORIES[name], steps)
    for estimator in (estimators.Unroll(), estimators.Adjoint()):
        gradient = found(FACTORIES[name](), steps, estimator=estimator)
        torch.testing.assert_close(gradient, expected, **TOLERANCE.get(name, EXACT))


@pytest.mark.parametrize("name", FACTORIES)
def test_what_torchopt_itself_makes_of_it(name):
    raw, params, phi = FACTORIES[name](), {"w": START.clone().requires_grad_()}, PHI.clone().requires_grad_()
    state = raw.init(params)
    for _ in range(8 if name == "radam" else 3):
        (g,) = torch.autograd.grad(inner(params, {"phi": phi}, None), params["w"], create_graph=True)
        params, state = apply(raw, {"w": g}, state, params)
    (gradient,) = torch.autograd.grad(outer(params, {}), phi)
    assert bool(gradient.isnan().any()) == (name in NAN | {"radam"})


@pytest.mark.parametrize("name", FACTORIES)
def test_states_and_values_are_torchopts(name):
    raw, mended = FACTORIES[name](), repaired(FACTORIES[name]())
    paths = []
    for optimizer in (raw, mended):
        params, state = {"w": START}, optimizer.init({"w": START})
        for t in range(8):
            params, state = apply(optimizer, {"w": f64(0.0, 0.1 * t, 0.3, -0.2 * t)}, state, params)
        paths.append((params["w"], [leaf for leaf in torchopt.pytree.tree_leaves(state) if torch.is_tensor(leaf)]))
    tolerance = TOLERANCE.get(name, {"rtol": 1e-12, "atol": 1e-12})
    torch.testing.assert_close(*[params for params, _ in paths], **tolerance)
    torch.testing.assert_close(*[state for _, state in paths], **tolerance)


def test_adagrad_without_eps_keeps_its_zero():
    adagrad = repaired(torchopt.adagrad(lr=0.1, eps=0.0))
    g = f64(0.0, 2.0).requires_grad_()
    moved, _ = apply(adagrad, {"w": g}, adagrad.init({"w": f64(1, 1)}), {"w": f64(1, 1)})
    torch.testing.assert_close(moved["w"], f64(1.0, 0.9))
    assert torch.autograd.grad(moved["w"].sum(), g)[0].isfinite().all()


TORCHS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam": (torch.optim.Adam, OPTIONS),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, **OPTIONS}),
    "adamw": (torch.optim.AdamW, OPTIONS),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, **OPTIONS}),
    "centered rmsprop": (torch.optim.RMSprop, {"centered": True, **OPTIONS}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, **OPTIONS}),
    "nadam": (torch.optim.NAdam, OPTIONS),
    "radam": (torch.optim.RAdam, {"betas": (0.9, 0.95), **OPTIONS}),
}


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("name", TORCHS)
def test_every_mirror(name, steps, warm):
    """A warm start is one with gradients of zero, or of three entries alone."""
    kind, options = TORCHS[name]
    options = {**options, "weight_decay": 0.0}

    def fresh():
        w = torch.nn.Parameter(START.clone())
        optimizer = kind([w], **options)
        for t in range(warm):
            w.grad = f64(0.0, 0.0, 0.3, 0.0) * t
            optimizer.step()
            with torch.no_grad():
                w.copy_(START)
        return w, optimizer

    w, optimizer = fresh()
    rule = mirror(optimizer, {"w": w})

    def after(phi):
        w, optimizer = fresh()

        def step(_, g):
            w.grad = g
            optimizer.step()
            return w.detach().clone()

        return by_steps(step, steps)(phi)

    expected = slopes(after)
    for estimator in (estimators.Unroll(), estimators.Adjoint()):
        gradient = found(rule.transformation, steps, rule.state, estimator)
        torch.testing.assert_close(gradient, expected, **EXACT)
