"""What TorchOpt 0.7.3 gets wrong, each shown to be wrong when raw and right when repaired.

A test of `raw` that fails says that TorchOpt has mended this itself, and that the repair may go.
"""

import inspect
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from hypothesis import given, settings
from torchopt.transform import add_decayed_weights, masked, scale, scale_by_adam, trace
from torchopt.transform.trace import TraceState

from metakd.batch import tensors
from metakd.inner import apply, mirror, repaired
from tests.estimators.problems import Bilevel, central_differences, flat, relative, some_direction


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def walk(optimizer, gradients, params, state=None):
    """The parameters after each step with the given gradients."""
    state, path = optimizer.init(params) if state is None else state, []
    for g in gradients:
        params, state = apply(optimizer, g, state, params)
        path.append(params)
    return path


def torch_walk(kind, gradients, params, before=(), **options):
    """The same by torch.optim, after steps with the gradients `before`; also what it starts from."""
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer, path, buffers = kind(leaves.values(), **options), [], []
    for t, g in enumerate([*before, *gradients]):
        if t == len(before):
            buffers = [optimizer.state[p].get("momentum_buffer") for p in leaves.values()]
            buffers = [None if b is None else b.clone() for b in buffers]
        for name, p in leaves.items():
            p.grad = None if g[name] is None else g[name].clone()
        optimizer.step()
        path.append({name: p.detach().clone() for name, p in leaves.items()})
    return path[len(before) :], path[len(before) - 1] if before else params, buffers


def distance(path, other):
    return max((flat(a) - flat(b)).abs().max().item() for a, b in zip(path, other, strict=True))


def unrolled(optimizer, problem):
    """The hypergradient by autograd through TorchOpt's functional interface as its documentation has it."""
    params = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    meta = {name: p.clone().requires_grad_() for name, p in problem.meta_params.items()}
    state = optimizer.init(params)
    for batch in problem.batches:
        loss = problem.inner(params, meta, batch)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        updates, state = optimizer.update(dict(zip(params, grads, strict=True)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    found = torch.autograd.grad(problem.outer(params, meta), list(meta.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(meta.items(), found, strict=True)}


def along_and_slope(gradient, problem):
    """The derivative along a direction, by a hypergradient and by central differences of torch.optim."""
    direction = some_direction(problem.meta_params)
    slope = central_differences(problem.after_torch_steps, problem.meta_params, direction)
    return (flat(gradient) * flat(direction)).sum().item(), slope


def test_momentum_that_starts_warm():
    params, gradients = {"w": f64(1, 2, 3, 4, 5)}, [{"w": f64(0.1, -0.2, 0.3, -0.1, 0.2)}] * 2
    options = {"lr": 0.5, "momentum": 0.9}
    expected, start, (buffer,) = torch_walk(torch.optim.SGD, gradients, params, gradients * 2, **options)

    def warm(wrap):
        optimizer = wrap(torchopt.sgd(**options))
        return walk(optimizer, gradients, start, (TraceState([buffer.clone()]), *optimizer.init(start)[1:]))

    raw = warm(lambda optimizer: optimizer)
    b_plus_g = start["w"] - 0.5 * (buffer + gradients[0]["w"])
    torch.testing.assert_close(raw[0]["w"], b_plus_g)
    assert distance(raw, expected) > 1e-2
    assert distance(warm(repaired), expected) < 1e-14


def test_one_sgd_object_for_two_hypergradients():
    """The first step is undampened, each time."""
    problem = Bilevel(rule="momentum")
    expected = problem.double_backward().gradient
    raw, mended = problem.torchopt(), repaired(problem.torchopt())
    assert relative(unrolled(raw, problem), expected) < 1e-12
    assert relative(unrolled(raw, problem), expected) > 1e-2
    for _ in range(3):
        assert relative(unrolled(mended, problem), expected) < 1e-12


def test_one_sgd_object_for_two_paths_at_a_time():
    params, gradients = {"w": f64(1, 2)}, [{"w": f64(0.1, -0.2)}] * 3
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.5}
    expected, *_ = torch_walk(torch.optim.SGD, gradients, params, **options)
    optimizer = repaired(torchopt.sgd(**options))
    states, paths = [optimizer.init(params)] * 2, [[params], [params]]
    for g in gradients:
        for i in range(2):
            moved, states[i] = apply(optimizer, g, states[i], paths[i][-1])
            paths[i].append(moved)
    for path in paths:
        assert distance(path[1:], expected) < 1e-14


@pytest.mark.parametrize("rule", ["clip, momentum", "clip, adam"])
def test_clipping_while_it_is_active(rule):
    problem = Bilevel(rule=rule, losses=3, steps=2, seed=1)
    raw, slope = along_and_slope(unrolled(problem.torchopt(), problem), problem)
    assert abs(raw - slope) > 0.1 * abs(slope)
    mended = unrolled(repaired(problem.torchopt()), problem)
    found, slope = along_and_slope(mended, problem)
    assert abs(found - slope) < 1e-8 * flat(mended).norm()


def test_clipping_while_it_is_not():
    problem = Bilevel(rule="momentum", steps=2)

    def clipped():
        return torchopt.chain(torchopt.clip_grad_norm(max_norm=1e6), problem.torchopt())

    expected = problem.double_backward().gradient
    assert relative(unrolled(clipped(), problem), expected) < 1e-12
    assert relative(unrolled(repaired(clipped()), problem), expected) < 1e-12


@pytest.mark.parametrize(
    ("kind", "torch_kind"), [(torchopt.adam, torch.optim.Adam), (torchopt.adamw, torch.optim.AdamW)]
)
def test_adam_in_float64(kind, torch_kind):
    generator = torch.Generator().manual_seed(0)
    params = {"w": f64(1, 2, 3, 4)}
    gradients = [{"w": torch.randn(4, generator=generator, dtype=torch.float64)} for _ in range(5)]
    options = {"lr": 1.0, "weight_decay": 0.1}
    expected, *_ = torch_walk(torch_kind, gradients, params, **options)
    assert distance(walk(kind(**options), gradients, params), expected) > 1e-9
    assert distance(walk(repaired(kind(**options)), gradients, params), expected) < 1e-12


def dead_unit_and_unused_class(optimizer):
    """Hypergradient and central differences where a ReLU never fires and a class never occurs."""
    x, y = f64(1.0, -0.5, 2.0)[:, None], torch.tensor([0, 1, 0])
    params = {
        "w": f64(0.5, -0.3)[:, None],
        "b": f64(1.0, -9.0),
        "v": f64(0.1, 0.2, 0.3, -0.2, 0.1, 0.3).reshape(3, 2),
    }
    used = torch.ones(3, 2, dtype=torch.float64)
    used[2] = 0  # the logit of the class that never occurs is a constant

    def logits(p):
        return (x @ p["w"].T + p["b"]).relu() @ (p["v"] * used).T

    def inner(p, m, batch):
        return (m["phi"].sigmoid() * torch.nn.functional.cross_entropy(logits(p), y, reduction="none")).mean()

    def outer(p, m):
        return (logits(p) ** 2).sum()

    meta = {"phi": f64(0.3, -0.2, 0.1)}

    def after(moved):
        leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
        real = torch.optim.Adam(leaves.values(), lr=0.1, eps=0.05)
        for _ in range(2):
            real.zero_grad()
            inner(leaves, moved, None).backward()
            real.step()
        return outer(leaves, moved).item()

    problem = SimpleNamespace(
        inner=inner, outer=outer, params=params, meta_params=meta, batches=[None] * 2, after_torch_steps=after
    )
    gradient = unrolled(optimizer, problem)
    return gradient, *along_and_slope(gradient, problem)


def test_adam_where_gradients_are_exactly_zero():
    raw, *_ = dead_unit_and_unused_class(torchopt.adam(lr=0.1, eps=0.05))
    assert raw["phi"].isnan().any()
    mended, found, slope = dead_unit_and_unused_class(repaired(torchopt.adam(lr=0.1, eps=0.05)))
    assert mended["phi"].isfinite().all()
    assert abs(found - slope) < 1e-8 * abs(slope)


def test_the_accelerated_adam_has_other_derivatives():
    problem = Bilevel(rule="adam", steps=2)
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 5e-2, "weight_decay": 0.1, "use_accelerated_op": True}
    expected = problem.double_backward().gradient
    assert relative(unrolled(torchopt.adam(**options), problem), expected) > 1e-3
    assert relative(unrolled(repaired(torchopt.adam(**options)), problem), expected) < 1e-10


def test_update_writes_in_place_by_default_and_cuts_the_graph():
    for optimizer in (torchopt.sgd(lr=0.1), torchopt.sgd(lr=0.1, momentum=0.9), torchopt.adam(lr=0.1)):
        params, x = {"w": f64(1, 2)}, f64(0.5, 0.7).requires_grad_()
        updates, _ = optimizer.update({"w": x**2}, optimizer.init(params), params=params)
        assert not torchopt.apply_updates(params, updates)["w"].requires_grad
        assert not torch.equal(params["w"], f64(1, 2))
        for used in (optimizer, repaired(optimizer)):
            params, g = {"w": f64(1, 2)}, {"w": x**2}
            state = used.init(params)
            before = [t.clone() for t in tensors((params, g, state))]
            moved, _ = apply(used, g, state, params)
            assert torch.autograd.grad(moved["w"].sum(), x)[0].any()
            assert all(torch.equal(a, b) for a, b in zip(before, tensors((params, g, state)), strict=True))


@pytest.mark.parametrize("raw", [torchopt.clip_grad_norm(max_norm=0.1), trace(momentum=0.9), scale_by_adam()])
def test_repaired_updates_never_write_in_place(raw):
    params, g = {"w": f64(1, 2)}, {"w": f64(3, 4)}
    for optimizer, writes in ((raw, True), (repaired(raw), False)):
        state = optimizer.init(params)
        before = [t.clone() for t in tensors((g, state))]
        optimizer.update(g, state, params=params)
        assert all(torch.equal(x, y) for x, y in zip(before, tensors((g, state)), strict=True)) != writes


def test_positional_arguments_of_sgd_and_meta_sgd_differ():
    plain, meta = (list(inspect.signature(f).parameters) for f in (torchopt.sgd, torchopt.MetaSGD.__init__))
    assert plain[1:4] == ["momentum", "dampening", "weight_decay"]
    assert meta[2:6] == ["lr", "momentum", "weight_decay", "dampening"]
    w = torch.nn.Parameter(f64(1.0))
    optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9, dampening=0.25, weight_decay=0.1)
    inner = mirror(optimizer, {"w": w})
    path = walk(inner.transformation, [{"w": f64(2.0)}] * 2, {"w": f64(1.0)}, inner.state)
    expected, *_ = torch_walk(
        torch.optim.SGD,
        [{"w": f64(2.0)}] * 2,
        {"w": f64(1.0)},
        lr=0.5,
        momentum=0.9,
        dampening=0.25,
        weight_decay=0.1,
    )
    assert distance(path, expected) < 1e-14


def test_frozen_parameters():
    """TorchOpt's MetaOptimizer fails on them; the functional interface never sees them."""
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torchopt.MetaSGD(model, lr=0.1).step(model(torch.ones(1, 2)).sum())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = mirror(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), trainable)
    moved, _ = apply(inner.transformation, {"weight": torch.ones(1, 2)}, inner.state, trainable)
    torch.testing.assert_close(moved["weight"], model.weight - 0.1)


def test_a_parameter_that_skips_a_step_keeps_its_momentum():
    params = {"a": f64(1, 2), "b": f64(3)}
    gradients = [{"a": f64(1, 1), "b": b} for b in (f64(1), None, f64(1))]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    expected, *_ = torch_walk(torch.optim.SGD, gradients, params, **options)
    try:
        raw = distance(walk(torchopt.sgd(**options), gradients, params), expected)
    except (TypeError, AttributeError):  # its buffer is None by then
        raw = float("inf")
    assert raw > 1e-2
    assert distance(walk(repaired(torchopt.sgd(**options)), gradients, params), expected) < 1e-14


CLIP = {"max_norm": 0.2}
ADAM = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 5e-2}


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchopt.chain(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM)),
        lambda: torchopt.combine.chain(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM)),
        lambda: torchopt.combine.chain.flat(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM)),
        lambda: torchopt.clip_grad_norm(**CLIP).chain(torchopt.adam(**ADAM)),
        lambda: torchopt.chain(torchopt.chain(torchopt.chain(torchopt.clip_grad_norm(**CLIP))), torchopt.adam(**ADAM)),
        lambda: torchopt.chain(scale(1.0), torchopt.chain(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM))),
        lambda: masked(torchopt.chain(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM)), everything),
        lambda: repaired(repaired(torchopt.chain(torchopt.clip_grad_norm(**CLIP), torchopt.adam(**ADAM)))),
    ],
    ids=[
        "chain",
        "combine.chain",
        "chain.flat",
        ".chain()",
        "nested",
        "in the middle",
        "masked",
        "repaired twice",
    ],
)
def test_wherever_they_stand(build):
    problem = Bilevel(rule="clip, adam", steps=3, seed=2)
    assert relative(unrolled(repaired(build()), problem), problem.double_backward().gradient) < 1e-10


def everything(params):
    return dict.fromkeys(params, True)


def test_a_mask_still_masks():
    params, g = {"a": f64(1, 2), "b": f64(3)}, {"a": f64(3, 4), "b": f64(5)}
    clip = repaired(masked(torchopt.clip_grad_norm(max_norm=1.0), {"a": True, "b": False}))
    updates, _ = clip.update(g, clip.init(params), params=params, inplace=False)
    torch.testing.assert_close(updates, {"a": f64(0.6, 0.8), "b": f64(5)}, rtol=1e-6, atol=0)
    updates, _ = clip.update({**g, "b": None}, clip.init(params), params=params, inplace=False)
    assert updates["b"] is None
    torch.testing.assert_close(updates["a"], f64(0.6, 0.8), rtol=1e-6, atol=0)


def test_bare_transformations_outside_an_alias():
    params, gradients = {"w": f64(1, 2)}, [{"w": f64(0.1, -0.2)}] * 3
    optimizer = repaired(torchopt.chain(add_decayed_weights(0.1), trace(momentum=0.9), scale(-0.5)))
    expected, *_ = torch_walk(torch.optim.SGD, gradients, params, lr=0.5, momentum=0.9, weight_decay=0.1)
    assert distance(walk(optimizer, gradients, params), expected) < 1e-14


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1]), st.booleans())
def test_states_keep_their_layout(momentum, dampening, decay, maximize):
    """So that a state of TorchOpt's own can be handed in: fields and tensors are the same."""
    sgd = torchopt.sgd(lr=0.1, momentum=momentum, dampening=dampening, weight_decay=decay, maximize=maximize)
    params = {"w": f64(1, 2), "b": f64(3)}
    raw, mended = sgd.init(params), repaired(sgd).init(params)
    assert len(raw) == len(mended)
    for a, b in zip(raw, mended, strict=True):
        assert a._fields == b._fields[: len(a._fields)]
    assert all(torch.equal(a, b) for a, b in zip(tensors(raw), tensors(mended), strict=True))


def test_torchopts_own_cold_state_is_understood():
    params, gradients = {"w": f64(1, 2)}, [{"w": f64(0.1, -0.2)}] * 3
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.5}
    expected, *_ = torch_walk(torch.optim.SGD, gradients, params, **options)
    sgd = torchopt.sgd(**options)
    assert distance(walk(repaired(sgd), gradients, params, sgd.init(params)), expected) < 1e-14


def warm_up(count):
    return torchopt.schedule.linear_schedule(init_value=0.1, end_value=0.5, transition_steps=count, transition_begin=0)


OTHERS = {
    "rmsprop": lambda: torchopt.rmsprop(lr=0.1, eps=1e-2),
    "centered rmsprop": lambda: torchopt.rmsprop(lr=0.1, eps=1e-2, centered=True, momentum=0.0),
    "adagrad": lambda: torchopt.adagrad(lr=0.1),
    "adadelta": lambda: torchopt.adadelta(lr=0.1),
    "adamax": lambda: torchopt.adamax(lr=0.1),
    "radam": lambda: torchopt.radam(lr=0.1),
    "schedule": lambda: torchopt.sgd(lr=warm_up(4)),
    "nan to num": lambda: torchopt.chain(torchopt.nan_to_num(0.0), torchopt.sgd(lr=0.1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_transformations_stay_the_same_where_no_gradient_is_zero(name):
    problem = Bilevel(steps=3, seed=4)
    raw = unrolled(OTHERS[name](), problem)
    assert flat(raw).isfinite().all() and flat(raw).any()
    assert relative(unrolled(repaired(OTHERS[name]()), problem), raw) < 1e-12


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pattern", ["always", "once"])
def test_other_transformations_with_gradients_of_none(name, pattern):
    """The parameter stays for that step, and the others go where they go without it."""
    params = {"a": f64(1, 2), "b": f64(3)}
    with_b = [{"a": f64(0.5, -1.0), "b": None if pattern == "always" or t == 1 else f64(1)} for t in range(3)]
    path = walk(repaired(OTHERS[name]()), with_b, params)
    without = walk(repaired(OTHERS[name]()), [{"a": g["a"]} for g in with_b], {"a": params["a"]})
    assert distance([{"a": p["a"]} for p in path], without) == 0.0
    assert torch.equal(path[1]["b"], path[0]["b"])
    assert torch.equal(path[2]["b"], params["b"]) == (pattern == "always")


@pytest.mark.parametrize("name", [name for name in OTHERS if "rmsprop" in name] + ["adagrad"])
def test_a_mended_state_waits_where_there_is_no_gradient(name):
    params = {"a": f64(1, 2), "b": f64(3)}
    gradients = [{"a": f64(0.5, -1.0), "b": b} for b in (f64(1), None, f64(1))]
    path = walk(repaired(OTHERS[name]()), gradients, params)
    alone = walk(repaired(OTHERS[name]()), [{"b": f64(1)}] * 2, {"b": f64(3)})
    assert distance([{"b": path[0]["b"]}, {"b": path[2]["b"]}], alone) == 0.0


def test_a_transformation_of_the_users_own():
    def update(updates, state, *, params=None, inplace=True):
        return {name: -0.5 * g for name, g in updates.items()}, state + 1

    own = torchopt.base.GradientTransformation(lambda params: 0, update)
    params = {"a": f64(1, 2), "b": f64(3)}
    moved, state = apply(repaired(own), {"a": f64(2, 2), "b": None}, 0, params)
    torch.testing.assert_close(moved, {"a": f64(0, 1), "b": f64(3)})
    assert state == 1


def test_apply_keeps_the_very_tensor_of_a_parameter_without_a_gradient():
    params = {"a": f64(1), "b": f64(2)}
    moved, _ = apply(repaired(torchopt.sgd(lr=1.0)), {"a": f64(1), "b": None}, ((),), params)
    assert moved["b"] is params["b"] and moved["a"].item() == 0
    assert list(moved) == ["a", "b"]
