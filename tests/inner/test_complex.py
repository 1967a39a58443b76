"""Complex parameters: torch.optim moves them as two real numbers an entry, and so does the mirror."""

import pytest
import torch
import torchopt

from metakd.batch import tensors
from metakd.inner import apply, as_real, inner_optimizer, mirror, plain_sgd

KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {"betas": (0.9, 0.99)}),
}


def drawn(shape, dtype, seed):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def params_and_gradients(steps):
    shapes = {"c": ((2, 3), torch.complex128), "r": ((4,), torch.float64), "s": ((), torch.complex128)}
    params = {name: torch.nn.Parameter(drawn(*kind, seed)) for seed, (name, kind) in enumerate(shapes.items())}
    return params, [{name: drawn(*kind, 10 + t) for name, kind in shapes.items()} for t in range(steps)]


def views(values):
    return {name: as_real(value.detach().clone()) for name, value in values.items()}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("warm", [0, 2, 6])
@pytest.mark.parametrize("name", KINDS)
def test_steps_on_the_real_views_are_those_of_torch(name, warm, foreach):
    kind, options = KINDS[name]
    params, gradients = params_and_gradients(warm + 3)
    optimizer = kind(params.values(), lr=0.1, weight_decay=0.05, foreach=foreach, **options)

    def real_step(t):
        for name, p in params.items():
            p.grad = gradients[t][name].clone()
        optimizer.step()

    for t in range(warm):
        real_step(t)
    inner = mirror(optimizer, params)
    assert not any(t.is_complex() for t in tensors(inner.state))
    at, state, path = views(params), inner.state, []
    for t in range(warm, warm + 3):
        at, state = apply(inner.transformation, views(gradients[t]), state, at)
        path.append(at)
    for t, virtual in zip(range(warm, warm + 3), path, strict=True):
        real_step(t)
        torch.testing.assert_close(virtual, views(params), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_cold_state_is_that_of_the_real_views(name):
    kind, options = KINDS[name]
    params, _ = params_and_gradients(0)
    inner = mirror(kind(params.values(), lr=0.1, **options), params)
    for state in (inner.state, inner.transformation.init(params), inner.transformation.init(views(params))):
        shapes = {name: {t.shape for t in tensors(part) if t.ndim or name == "r"} for name, part in state.items()}
        for name, p in views(params).items():
            assert shapes[name] <= {p.shape, torch.Size(())}


def test_plain_sgd_and_transformations_of_torchopt():
    params, (gradients,) = params_and_gradients(1)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    at = views(params)
    for inner in (
        plain_sgd(optimizer, params),
        inner_optimizer(torchopt.sgd(lr=0.1, momentum=0.9), optimizer, params),
    ):
        moved, _ = apply(inner.transformation, views(gradients), inner.state, at)
        torch.testing.assert_close(moved, {name: at[name] - 0.1 * as_real(g) for name, g in gradients.items()})


def test_real_views():
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal(as_real(z), torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert torch.equal(as_real(z.conj()), torch.tensor([[1.0, -2.0], [3.0, 1.0]]))
    assert as_real(z).data_ptr() == z.data_ptr()
    x = torch.ones(2)
    assert as_real(x) is x
