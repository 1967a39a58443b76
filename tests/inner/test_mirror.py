"""K steps of `mirror` are K steps of the torch optimizer, whose state nobody writes to."""

import copy
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from metakd import MetaKDError, hypergradient
from metakd.batch import tensors
from metakd.inner import apply, mirror, plain_sgd
from tests.estimators.problems import Bilevel, central_differences, flat, some_direction

SHAPES = ((2, 3), (4,), (), (1,), (0,))
ROUNDING = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}

LR = st.sampled_from([0.0, 0.01, 0.5])
DECAY = st.sampled_from([0.0, 0.1])
SGD_GROUP = st.one_of(
    st.fixed_dictionaries(
        {
            "lr": LR,
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "dampening": st.sampled_from([0.0, 0.3, 1.0]),
            "weight_decay": DECAY,
            "maximize": st.booleans(),
        }
    ),
    st.fixed_dictionaries({"lr": LR, "momentum": st.just(0.8), "nesterov": st.just(True), "weight_decay": DECAY}),
)
ADAM_GROUP = st.fixed_dictionaries(
    {
        "lr": LR,
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "weight_decay": DECAY,
        "maximize": st.booleans(),
    }
)


def with_flags(group, **flags):
    """The settings of a group with some more, drawn."""
    return st.builds(lambda group, more: {**group, **more}, group, st.fixed_dictionaries(flags))


HAS_DECOUPLED = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults
FLAG = st.booleans()
AMSGRAD_GROUP = with_flags(ADAM_GROUP, amsgrad=FLAG)
# Rectified steps need b2 > 2 / 3, and at least five steps before them.
RADAM_BETAS = st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.7)])
RMSPROP_GROUP = st.fixed_dictionaries(
    {
        "lr": LR,
        "alpha": st.sampled_from([0.99, 0.5]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "weight_decay": DECAY,
        "momentum": st.sampled_from([0.0, 0.9]),
        "centered": FLAG,
        "maximize": FLAG,
    }
)
ADAGRAD_GROUP = st.fixed_dictionaries(
    {
        "lr": LR,
        "lr_decay": st.sampled_from([0.0, 0.3]),
        "eps": st.sampled_from([1e-10, 1e-2]),
        "weight_decay": DECAY,
        "maximize": FLAG,
    }
)
GROUPS = {
    torch.optim.SGD: SGD_GROUP,
    torch.optim.Adam: with_flags(AMSGRAD_GROUP, decoupled_weight_decay=FLAG) if HAS_DECOUPLED else AMSGRAD_GROUP,
    torch.optim.AdamW: AMSGRAD_GROUP,
    torch.optim.RMSprop: RMSPROP_GROUP,
    torch.optim.Adagrad: ADAGRAD_GROUP,
    torch.optim.NAdam: with_flags(ADAM_GROUP, momentum_decay=st.sampled_from([4e-3, 0.5]), decoupled_weight_decay=FLAG),
    torch.optim.RAdam: with_flags(ADAM_GROUP, betas=RADAM_BETAS, decoupled_weight_decay=FLAG),
}
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
KERNELS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@dataclass(frozen=True)
class Case:
    """An optimizer over groups of parameters, some of them frozen, and the gradients that it will meet."""

    kind: type[torch.optim.Optimizer]
    groups: list[dict[str, Any]]
    kernel: dict[str, Any]
    seed: int
    dtype: torch.dtype = torch.float64
    params: dict[str, torch.nn.Parameter] = field(init=False, default_factory=dict)

    def build(self) -> torch.optim.Optimizer:
        """The optimizer; `params` holds its trainable parameters in an order of their own."""
        self.generator.manual_seed(self.seed)
        held, names = [], {}
        for i, group in enumerate(self.groups):
            own = []
            for j in range(self.draw(1, 4)):
                shape = SHAPES[self.draw(0, len(SHAPES))]
                p = torch.nn.Parameter(torch.randn(shape, generator=self.generator).to(self.dtype))
                p.requires_grad_(self.draw(0, 5) > 0)
                own.append(p)
                names[f"{self.draw(0, 100)}.{i}.{j}"] = p
            held.append({"params": own, **group})
        optimizer = self.kind(held, **self.kernel)
        self.params.update({name: p for name, p in names.items() if p.requires_grad})
        return optimizer

    generator: torch.Generator = field(init=False, default_factory=torch.Generator)

    def draw(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def gradients(self):
        """A gradient for each parameter, or None; of several parameters the last one never has a gradient."""
        # torch's fused SGD fails by itself where one buffer starts later than another.
        always = "fused" in self.kernel
        drawn = {
            name: torch.randn(p.shape, generator=self.generator).to(p.dtype) if always or self.draw(0, 4) else None
            for name, p in self.params.items()
        }
        if len(drawn) > 1:
            drawn[list(drawn)[-1]] = None
        return drawn

    def real_step(self, optimizer, gradients):
        for name, p in self.params.items():
            p.grad = None if gradients[name] is None else gradients[name].clone()
        optimizer.step()


def cases(kind, dtype=torch.float64):
    return st.builds(
        Case,
        st.just(kind),
        st.lists(GROUPS[kind], min_size=1, max_size=3),
        st.sampled_from([kernel for kernel in KERNELS if kind in FUSED or "fused" not in kernel]),
        st.integers(0, 2**31 - 1),
        st.just(dtype),
    )


def look(optimizer):
    """Every tensor of an optimizer's state and groups: identity, version, value."""
    everything = (list(optimizer.state.values()), [list(group.values()) for group in optimizer.param_groups])
    return [(id(t), t._version, t.detach().clone()) for t in tensors(everything)]


def assert_same_look(before, after):
    assert [entry[:2] for entry in before] == [entry[:2] for entry in after]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


def assert_mirrored(case, warm, steps):
    """After `warm` real steps, virtual ones leave no trace, and the real ones that follow are the same."""
    optimizer = case.build()
    for _ in range(warm):
        case.real_step(optimizer, case.gradients())
    if not case.params:
        return
    plan = [case.gradients() for _ in range(steps)]
    before = look(optimizer)
    inner = mirror(optimizer, case.params)
    params, state, path = {name: p.detach() for name, p in case.params.items()}, inner.state, []
    for gradients in plan:
        params, state = apply(inner.transformation, gradients, state, params)
        path.append(params)
    assert_same_look(before, look(optimizer))
    for gradients, virtual in zip(plan, path, strict=True):
        case.real_step(optimizer, gradients)
        for name, p in case.params.items():
            torch.testing.assert_close(virtual[name], p.detach(), **ROUNDING[case.dtype])


@pytest.mark.parametrize("kind", GROUPS)
def test_k_steps_are_those_of_torch(kind):
    @settings(deadline=None, max_examples=80)
    @given(cases(kind), st.integers(0, 3), st.integers(1, 4))
    def check(case, warm, steps):
        assert_mirrored(case, warm, steps)

    check()


@pytest.mark.parametrize("kind", GROUPS)
def test_in_float32_to_rounding(kind):
    @settings(deadline=None, max_examples=20)
    @given(cases(kind, torch.float32), st.integers(0, 2), st.integers(1, 3))
    def check(case, warm, steps):
        assert_mirrored(case, warm, steps)

    check()


@pytest.mark.parametrize("kind", GROUPS)
def test_a_learning_rate_in_a_tensor(kind):
    group = {"lr": torch.tensor(0.25)}
    assert_mirrored(Case(kind, [group, {}], {}, seed=1), warm=2, steps=3)


def test_tensor_betas_as_torch_takes_them():
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    assert_mirrored(Case(torch.optim.Adam, [{"betas": betas}], {"foreach": False}, seed=1), warm=1, steps=2)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_state_dict_that_was_saved_and_loaded(kind):
    options = {"momentum": 0.9, "dampening": 0.3} if kind is torch.optim.SGD else {}
    case = Case(kind, [{"lr": 0.1, **options}] * 2, {}, seed=5)
    optimizer = case.build()
    for _ in range(2):
        case.real_step(optimizer, case.gradients())
    loaded = kind([{"params": group["params"]} for group in optimizer.param_groups])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients = case.gradients()
    inner = mirror(loaded, case.params)
    virtual, _ = apply(inner.transformation, gradients, inner.state, case.params)
    case.real_step(loaded, gradients)  # loading gives NAdam's product the parameter's dtype
    for name, p in case.params.items():
        torch.testing.assert_close(virtual[name], p, **ROUNDING[torch.float64])


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("build", [mirror, plain_sgd])
def test_the_learning_rates_are_those_of_the_moment(kind, build):
    """A scheduler's next step is seen by the next mirror."""
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = kind([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 1 + epoch])
    for epoch in range(3):
        gradients = {"p": torch.full_like(p, 1.0 + epoch), "q": torch.full_like(q, 2.0 - epoch)}
        before = {"p": p.detach().clone(), "q": q.detach().clone()}
        inner = build(optimizer, {"p": p, "q": q})
        virtual, _ = apply(inner.transformation, gradients, inner.state, before)
        p.grad, q.grad = gradients["p"].clone(), gradients["q"].clone()
        optimizer.step()
        if build is plain_sgd:
            lrs = {"p": 0.1 * 0.5**epoch, "q": 0.2 * (1 + epoch)}
            expected = {name: before[name] - lrs[name] * gradients[name] for name in before}
        else:
            expected = {"p": p.detach(), "q": q.detach()}
        torch.testing.assert_close(virtual, expected, **ROUNDING[torch.float64])
        scheduler.step()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(GROUPS)).flatmap(cases), st.integers(0, 2), st.integers(1, 3))
def test_plain_sgd_is_gradient_descent_at_each_groups_rate(case, warm, steps):
    optimizer = case.build()
    for _ in range(warm):
        case.real_step(optimizer, case.gradients())
    if not case.params:
        return
    before = look(optimizer)
    inner = plain_sgd(optimizer, case.params)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    params, state = {name: p.detach() for name, p in case.params.items()}, inner.state
    expected = dict(params)
    for _ in range(steps):
        gradients = case.gradients()
        params, state = apply(inner.transformation, gradients, state, params)
        for name, g in gradients.items():
            if g is not None:
                expected[name] = expected[name] - rates[id(case.params[name])] * g
    torch.testing.assert_close(params, expected, **ROUNDING[torch.float64])
    assert_same_look(before, look(optimizer))


def test_momentum_switched_on_in_the_middle_of_training():
    """Buffers that are not there yet start with the first gradient, undampened."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
    inner = mirror(optimizer, {"p": p})
    params, state = {"p": p.detach().clone()}, inner.state
    for _ in range(3):
        params, state = apply(inner.transformation, {"p": torch.ones_like(p)}, state, params)
        optimizer.step()
        torch.testing.assert_close(params["p"], p.detach(), **ROUNDING[torch.float64])


def test_adamw_whose_groups_do_not_say_that_their_decay_is_decoupled():
    """So it is in older torch, where AdamW is a class of its own."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    inner = mirror(optimizer, {"p": p})
    g = torch.tensor([0.3, 0.4], dtype=torch.float64)
    virtual, _ = apply(inner.transformation, {"p": g}, inner.state, {"p": p.detach()})
    expected = p.detach() * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(virtual["p"], expected, **ROUNDING[torch.float64])


SMOOTH = {
    torch.optim.RMSprop: {"centered": True, "momentum": 0.9},
    torch.optim.Adagrad: {"lr_decay": 0.1, "initial_accumulator_value": 0.01},
    torch.optim.NAdam: {"decoupled_weight_decay": True},
    torch.optim.RAdam: {"betas": (0.9, 0.99)},
    torch.optim.AdamW: {"amsgrad": True},
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("warm", [0, 5])
def test_hypergradients_through_the_mirror_are_central_differences_of_torch(kind, warm):
    """Three groups of their own hyper-parameters, one parameter unused, K = 3 steps."""
    problem = Bilevel(steps=5, unused=True, losses=3, seed=3)
    common = {
        "weight_decay": 0.1,
        **({"momentum": 0.9, "dampening": 0.2} if kind is torch.optim.SGD else {"eps": 0.05}),
        **SMOOTH.get(kind, {}),
    }
    rates = {"w10.weight": 0.3, "w10.bias": 0.1, "w2": 0.05, "scale": 0.2, "unused": 0.5}

    def train(params, optimizer, meta_params, batches):
        for batch in batches:
            optimizer.zero_grad()
            problem.inner(params, meta_params, batch).backward()
            optimizer.step()

    def fresh():
        params = {name: torch.nn.Parameter(p.clone()) for name, p in problem.params.items()}
        return params, kind([{"params": [p], "lr": rates[name]} for name, p in params.items()], **common)

    params, optimizer = fresh()
    train(params, optimizer, problem.meta_params, problem.batches[:warm])
    inner = mirror(optimizer, params)
    inner_loss, outer, _, meta_params, batches = problem.arguments()
    found = hypergradient(
        inner_loss,
        outer,
        {name: p.detach() for name, p in params.items()},
        meta_params,
        batches,
        optimizer=inner.transformation,
        optimizer_state=inner.state,
    ).gradient

    def after_real_steps(moved):
        params, optimizer = fresh()
        train(params, optimizer, meta_params, batches[:warm])
        train(params, optimizer, moved, batches)
        return outer(params, moved).item()

    direction = some_direction(meta_params)
    expected = central_differences(after_real_steps, meta_params, direction)
    along = (flat(found) * flat(direction)).sum().item()
    assert abs(along - expected) < 1e-7 * flat(found).norm().item()


class OwnSGD(torch.optim.SGD):
    """A subclass may do anything in its step."""


class OwnAdam(torch.optim.Adam):
    """A subclass may do anything in its step."""


@pytest.mark.parametrize("optimizer", [torch.optim.Rprop, torch.optim.Adadelta, torch.optim.Adamax, OwnSGD, OwnAdam])
def test_other_optimizers_are_an_error_that_lists_the_supported_ones(optimizer):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(MetaKDError) as error:
        mirror(optimizer([p], lr=0.1), {"p": p})
    message = str(error.value)
    assert f"cannot follow {optimizer.__name__}" in message
    for kind in GROUPS:
        assert f"torch.optim.{kind.__name__} (" in message
    for flag in ("nesterov", "betas", "maximize", "centered", "lr_decay", "momentum_decay", "amsgrad"):
        assert flag in message
    plain_sgd(optimizer([p], lr=0.1), {"p": p})


@pytest.mark.parametrize("kind", GROUPS)
def test_a_flag_of_a_later_torch_is_an_error_where_it_is_on(kind):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = kind([{"params": [p]}, {"params": [q]}], lr=0.1)
    optimizer.defaults["cautious"] = optimizer.param_groups[0]["cautious"] = False
    optimizer.param_groups[1]["cautious"] = True
    optimizer.param_groups[0]["name"] = "a key of the user's, or of a scheduler"
    with pytest.raises(MetaKDError, match=rf"does not know cautious=True of {kind.__name__};.*inner='sgd'"):
        mirror(optimizer, {"p": p, "q": q})
    mirror(optimizer, {"p": p})


@pytest.mark.parametrize("rectified", [False, True])
def test_radam_before_and_after_its_first_rectified_step(rectified):
    group = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    assert_mirrored(Case(torch.optim.RAdam, [group], {}, seed=7), warm=6 if rectified else 0, steps=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["fused", "capturable", "foreach"])
@pytest.mark.parametrize("kind", [kind for kind in GROUPS if kind is not torch.optim.SGD])
def test_counts_that_are_kept_on_the_device(kind, kernel):
    """They come off it by one transfer, and steps stay there."""
    p, q = (torch.nn.Parameter(torch.randn(3, dtype=torch.float64, device="cuda")) for _ in range(2))
    if kernel not in kind([p]).defaults:
        pytest.skip("this optimizer has no such flag")
    try:
        optimizer = kind([p, q], lr=0.1, **{kernel: True})
        for _ in range(2):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            optimizer.step()
    except RuntimeError as error:
        pytest.skip(str(error))  # torch has no such kernel on this device
    with pytest.MonkeyPatch.context() as patch:
        transfers, cpu = [], torch.Tensor.cpu
        patch.setattr(torch.Tensor, "cpu", lambda t: (transfers.append(t), cpu(t))[1])
        inner = mirror(optimizer, {"p": p, "q": q})
    assert len(transfers) <= 2
    moved, _ = apply(inner.transformation, {"p": p.grad, "q": None}, inner.state, {"p": p.detach().clone(), "q": q})
    q.grad = None
    optimizer.step()
    torch.testing.assert_close(moved["p"], p.detach(), rtol=1e-6, atol=1e-6)  # capturable counts are in float32


def test_an_initial_accumulator():
    groups = [{"lr": 0.1}, {"lr": 0.1}]
    case = Case(torch.optim.Adagrad, groups, {"initial_accumulator_value": 0.5}, seed=3)
    assert_mirrored(case, warm=0, steps=3)
    inner = mirror(case.build(), case.params)  # cold, in whatever comes without a state
    state = inner.transformation.init({name: p.detach() for name, p in case.params.items()})
    torch.testing.assert_close({n: s["sum"] for n, s in state.items()}, {n: s["sum"] for n, s in inner.state.items()})


@pytest.mark.parametrize("kind", GROUPS)
def test_a_parameter_whose_state_is_in_a_finer_dtype(kind):
    """The virtual steps run in the parameter's own."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = kind([p], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    p.grad = torch.ones_like(p)
    optimizer.step()
    for name, value in optimizer.state[p].items():
        if value.shape == p.shape:
            optimizer.state[p][name] = value.float()
    inner = mirror(optimizer, {"p": p})
    moved, state = apply(inner.transformation, {"p": torch.ones_like(p)}, inner.state, {"p": p.detach()})
    assert moved["p"].dtype == torch.bfloat16
    assert {t.dtype for t in tensors(state) if t.shape == p.shape} == {torch.bfloat16}


@pytest.mark.parametrize("build", [mirror, plain_sgd])
def test_an_optimizer_of_another_model_is_an_error(build):
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(MetaKDError, match=r"none of the student's trainable parameters.*another model"):
        build(optimizer, dict(model.named_parameters()))


@pytest.mark.parametrize("build", [mirror, plain_sgd])
def test_a_parameter_missing_from_the_optimizer_is_named(build):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(MetaKDError, match=r"1 trainable parameter.*\['bias'\].*requires_grad_\(False\)"):
        build(optimizer, dict(model.named_parameters()))
    model.bias.requires_grad_(False)
    build(optimizer, {"weight": model.weight})
