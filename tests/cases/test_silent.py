"""Situations in which hypergradients used to be wrong without a word; each against real steps, or refused by name."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from metakd import MetaKDError, check_hypergradient, estimators, validate
from metakd.terms import CrossEntropy
from tests.cases.real_steps import LR, Setup, assert_right, balanced, data

WIDTH, CLASSES = 6, 3


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())


def smooth(outputs: Tensor, batch) -> Tensor:
    return F.cross_entropy(outputs, batch.targets, reduction="none", label_smoothing=0.3)


HARD_AND_SMOOTH = {"hard": CrossEntropy(), "smooth": smooth}


# 1. A submodule with two names, a layer that is used twice, tied parameters, parameters kept in a list.


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.first = self.body[0]
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.first(x)[:, :CLASSES]


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.stack = nn.Sequential(layer, self.norm, nn.Tanh(), layer, self.norm, nn.Tanh())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x))


class KeptInAList(nn.Module):
    """Reads its parameters from a list, a dict and an attribute beside the module's own places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)
        self.decayed = [self.body[0].weight, self.head.weight]
        self.by_name = {"bias": self.body[0].bias}

    def forward(self, x: Tensor) -> Tensor:
        size = sum(p.square().sum() for p in self.decayed) + self.by_name["bias"].square().sum()
        return self.head(self.body(x)) * (1 + 0.1 * size)


@pytest.mark.parametrize("student", [TwoNames, UsedTwice, KeptInAList])
def test_a_parameter_with_several_places(student):
    balancer = assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))
    for name, p in balancer.student.named_parameters():
        assert isinstance(p, nn.Parameter), name


def test_a_submodule_with_two_names_goes_on_training():
    student = TwoNames().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    batch, meta_batch = data()
    before = student.first.weight.detach().clone()
    for _ in range(2):
        loss = balancer(batch, meta_batch)
        balancer.optimizer.zero_grad()
        loss.backward()
        balancer.optimizer.step()
    assert isinstance(student.first.weight, nn.Parameter) and student.first.weight is student.body[0].weight
    assert not torch.equal(student.first.weight, before)
    assert not any("frozen" in str(finding) for finding in validate(student))


# 2. Terms that read what a hook or the forward pass left behind.


class Features:
    """Keeps what a layer gave out."""

    def __init__(self, module: nn.Module) -> None:
        self.value = None
        module.register_forward_hook(self)

    def __call__(self, module, inputs, output) -> None:
        self.value = output

    def size(self, outputs: Tensor, batch) -> Tensor:
        return self.value.square().mean(1)


def hooked() -> Setup:
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()
    return Setup(student, {"hard": CrossEntropy(), "features": Features(student[0]).size})


def hooked_by_closure() -> Setup:
    student, store = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double(), {}
    student[0].register_forward_hook(lambda module, inputs, output: store.update(features=output))
    return Setup(student, {"hard": CrossEntropy(), "features": lambda z, batch: store["features"].square().mean(1)})


class Auxiliary(nn.Module):
    """Leaves a loss of its own as an attribute, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.aux = features.square().mean(1)
        return self.head(features)


def auxiliary() -> Setup:
    student = Auxiliary().double()
    return Setup(student, {"hard": CrossEntropy(), "aux": lambda z, batch: student.aux})


@pytest.mark.parametrize("build", [hooked, hooked_by_closure, auxiliary])
@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint(), estimators.OneStep("reverse")])
def test_terms_that_read_what_the_pass_left_behind(build, estimator):
    balancer = assert_right(build, estimator=estimator)
    assert balancer.report.influence[:, 1].abs().min() > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_the_pass_left_behind_is_the_real_ones_with_its_graph(accumulate):
    student = Auxiliary().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH), accumulate=accumulate)
    batch, meta_batch = data()
    loss = balancer(batch, meta_batch) + 0.5 * student.aux.mean()
    loss.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    losses = torch.stack([term(student(batch.inputs), batch) for term in HARD_AND_SMOOTH.values()], dim=1)
    ((balancer.report.weights * losses).sum(1).mean() + 0.5 * student.aux.mean()).backward()
    for one, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


# 3. Inner autograd and functorch in the student; writing where autograd does not look.


class Forces(nn.Module):
    """Outputs gradients of an energy, as molecular potentials do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force[:, :CLASSES]


class Jacobians(nn.Module):
    """Calls functorch on a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(lambda row: self.body(row).sum()))(x)
        return self.head(self.body(x)) + slopes[:, :CLASSES]


class Ensemble(nn.Module):
    """Heads stacked and mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.heads = nn.Parameter(torch.randn(3, WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda head: self.body(x) @ head)(self.heads).mean(0)


class BehindAutograd(nn.Module):
    """Writes to a layer's output through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        z.data.add_(1.0)
        return self.head(torch.tanh(z))


@pytest.mark.parametrize("student", [Forces, Jacobians, Ensemble, BehindAutograd])
def test_inner_derivatives_and_writing_behind_autograd(student):
    balancer = assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))
    batch, meta_batch = data()
    loss = balancer(batch, meta_batch)
    loss.backward()
    found = [p.grad.clone() for p in balancer.student.parameters() if p.grad is not None]
    balancer.student.zero_grad()
    outputs = balancer.student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in HARD_AND_SMOOTH.values()], dim=1)
    (balancer.report.weights * losses).sum(1).mean().backward()
    expected = [p.grad for p in balancer.student.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected)


def penalty() -> Setup:
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()

    def slope(outputs: Tensor, batch) -> Tensor:
        with torch.enable_grad():
            x = batch.inputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(student(x).square().sum(), x, create_graph=True)
        return g.square().sum(1)

    return Setup(student, {"hard": CrossEntropy(), "penalty": slope})


def test_a_gradient_penalty_as_a_term():
    assert_right(penalty)


# 4. Terms and meta losses that call layers of the student.


def own_head() -> Setup:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    student = Split().double()

    def term(features: Tensor, batch) -> Tensor:
        return F.cross_entropy(student.head(features), batch.targets, reduction="none")

    return Setup(student, {"hard": term, "size": lambda z, batch: z.square().mean(1)}, term)


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Unroll(), estimators.FiniteDifference()])
def test_terms_that_call_the_students_own_layers(estimator):
    loose = isinstance(estimator, estimators.FiniteDifference)
    balancer = assert_right(own_head, 1e-4 if loose else 1e-6, estimator=estimator)
    check_hypergradient(balancer, [data()[0]], data()[1], tolerance=1e-4 if loose else 1e-6)


def by_double_backward(balancer, batch, meta_batch) -> Tensor:
    """The influence by a graph of the step: the gradients that autograd means, where hooks change them."""
    student = balancer.student
    params = dict(student.named_parameters())
    weights = balancer.report.weights.clone().requires_grad_()
    outputs = student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in balancer.terms.values()], dim=1)
    loss = (weights * losses).sum() / len(losses)
    steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - LR * g for (name, p), g in zip(params.items(), steps, strict=True)}
    meta = balancer.meta_loss(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
    return torch.autograd.grad(meta, weights)[0] * len(losses)


# 5. Hooks that change gradients; 6. operations whose tangents torch drops.


class Reversal(nn.Module):
    """Reverses the gradient of one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        if z.requires_grad:
            z.register_hook(lambda g: -0.5 * g)
        return self.head(z)


@torch.library.custom_op("metakd_cases::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


def _slope(ctx, g):
    (x,) = ctx.saved_tensors
    return 3 * x**2 * g


cube.register_autograd(_slope, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


class CustomOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + cube(self.body(x)))


@pytest.mark.parametrize(("student", "layer"), [(Reversal, "body.0"), (CustomOperation, "body.0")])
def test_wrong_tangents_are_found_and_reverse_mode_takes_over(student, layer):
    def build() -> Setup:
        torch.manual_seed(1)
        return Setup(student().double(), HARD_AND_SMOOTH)

    balancer, (batch, meta_batch) = balanced(build()), data()
    with pytest.warns(UserWarning, match=f"forward mode is wrong on this model.*{layer}.*reverse mode") as caught:
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)
    assert len(caught) == 1
    expected = by_double_backward(balancer, batch, meta_batch)
    torch.testing.assert_close(balancer.report.influence, expected)
    with pytest.raises(MetaKDError, match="forward mode is wrong on this model"):
        balanced(build(), estimator=estimators.OneStep("forward"))(batch, meta_batch)


# 7. Caches of what was computed from parameters.


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class OwnCache(nn.Module):
    """Computes a matrix once and keeps it until its owner says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.head, self.cache = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, CLASSES), {}

    def forward(self, x: Tensor) -> Tensor:
        if "matrix" not in self.cache:
            self.cache["matrix"] = torch.tanh(self.free)
        return self.head(torch.tanh(x @ self.cache["matrix"]))


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint(), estimators.Unroll()])
def test_inside_a_cache_of_parametrizations(estimator):
    torch.manual_seed(1)
    students = [Parametrized().double()]
    students.append(Parametrized().double())
    students[1].load_state_dict(students[0].state_dict())
    batch, meta_batch = data()
    influences = []
    for student, inside in zip(students, (False, True), strict=True):
        balancer = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimator)
        if inside:
            with parametrize.cached():
                student(batch.inputs)
                loss = balancer(batch, meta_batch)
                loss.backward()
        else:
            balancer(batch, meta_batch).backward()
        influences.append(balancer.report.influence)
    torch.testing.assert_close(*influences)


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.OneStep("reverse"), estimators.Adjoint()])
def test_a_cache_that_only_the_loop_empties_is_refused(estimator):
    balancer = balanced(Setup(OwnCache().double(), HARD_AND_SMOOTH), estimator=estimator)
    with pytest.raises(MetaKDError, match="a cache of what comes from the parameters"):
        balancer(*data())
    assert balancer.student.cache == {}


# 8. Straight-through estimators and finite differences.


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z + (z.sign() - z).detach())


def test_finite_differences_of_a_straight_through_estimator_are_noticed():
    student = StraightThrough().double()
    batch, meta_batch = data()
    exact = balanced(Setup(student, HARD_AND_SMOOTH))
    exact(batch, meta_batch)
    reverse = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimators.OneStep("reverse"))
    reverse(batch, meta_batch)
    torch.testing.assert_close(exact.report.influence, reverse.report.influence)
    differences = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimators.FiniteDifference())
    with pytest.warns(UserWarning, match="straight-through"):
        differences(batch, meta_batch)


# 9. Side effects of a pass: inputs changed in place, counters, generators of its own.


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.5).add_(0.1))


class Counts(nn.Module):
    """What it computes depends on how often it was called: an attribute, a class variable, a list."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).calls = 0
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.count, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        type(self).calls += 1
        self.seen.append(len(x))
        return self.net(x * (1 + 0.3 * self.count) + 0.1 * type(self).calls + 0.05 * len(self.seen))


class OwnGenerators(nn.Module):
    """Draws masks from generators of its own: torch's, NumPy's, Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.torchs = torch.Generator().manual_seed(0)
        self.numpys = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, generator=self.torchs, dtype=x.dtype)
        mask = mask * torch.as_tensor(self.numpys.random(x.shape)) + torch.as_tensor(self.legacy.rand(*x.shape))
        return self.net(x * mask)


class RunningAverage(nn.Module):
    """Keeps an average in a tensor that is no buffer, and in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.average, self.array = torch.zeros(4, dtype=torch.float64), np.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(0.5 * x.detach().mean(0))
        self.array[...] = 0.5 * self.array + x.detach().mean(0).numpy()
        return self.net(x - self.average - torch.as_tensor(self.array))


@pytest.mark.parametrize("student", [ChangesItsInput, Counts, OwnGenerators, RunningAverage])
def test_side_effects_of_a_pass(student):
    assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))


@pytest.mark.parametrize("student", [ChangesItsInput, Counts, OwnGenerators, RunningAverage])
def test_a_call_has_the_side_effects_of_one_pass(student):
    torch.manual_seed(1)
    one = student().double()
    batch, meta_batch = data()
    inputs = batch.inputs.clone()
    one(inputs)
    expected = {name: value for name, value in vars(one).items() if not name.startswith("_")}
    calls = type(one).__dict__.get("calls")
    torch.manual_seed(1)
    other = student().double()
    mine = batch.inputs.clone()
    meta = meta_batch.inputs.clone()
    balanced(Setup(other, HARD_AND_SMOOTH))((mine, batch.targets), (meta, meta_batch.targets))
    assert torch.equal(mine, inputs) and torch.equal(meta, meta_batch.inputs)
    assert type(other).__dict__.get("calls") == calls
    for name, value in expected.items():
        found = getattr(other, name)
        if isinstance(value, torch.Generator):
            assert torch.equal(found.get_state(), value.get_state())
        elif isinstance(value, np.random.Generator):
            assert found.bit_generator.state == value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            assert np.array_equal(found.get_state()[1], value.get_state()[1])
            assert found.get_state()[2] == value.get_state()[2]
        elif isinstance(value, Tensor):
            assert torch.equal(found, value)
        else:
            assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value, name


class Hidden(nn.Module):
    """Draws from a generator in an object that the walk cannot look into."""

    class Foreign:
        __module__ = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.hidden = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)), self.Foreign()
        self.hidden.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * torch.rand(x.shape, generator=self.hidden.generator, dtype=x.dtype))


class FromElsewhere(nn.Module):
    """Reads a parameter from an object in which nothing can be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.optimizer = torch.optim.SGD([self.net[1].weight], lr=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.optimizer.param_groups[0]["params"][0].square().sum() * x[:, :CLASSES]


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (Hidden, "other losses than the real one: term 'hard'"),
        (FromElsewhere, "gradient of a virtual pass .*'net.1.weight'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(student, words):
    balancer = balanced(Setup(student().double(), HARD_AND_SMOOTH))
    batch, meta_batch = data()
    before = {name: p.detach().clone() for name, p in balancer.student.named_parameters()}
    for _ in range(2):  # it is not forgotten after the first time
        with pytest.raises(MetaKDError, match=words):
            balancer(batch, meta_batch)
    assert all(torch.equal(p, before[name]) for name, p in balancer.student.named_parameters())
    with pytest.raises(MetaKDError, match=words):
        balancer.meta_step([batch, batch], meta_batch)


def test_the_proof_is_given_anew_when_what_it_stands_on_changes():
    torch.manual_seed(1)
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()
    balancer, (batch, meta_batch) = balanced(Setup(student, HARD_AND_SMOOTH)), data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)

    def reverse(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: -g)

    student[0].register_forward_hook(reverse)
    with pytest.warns(UserWarning, match="forward mode is wrong"):
        balancer(batch, meta_batch)


def test_a_proof_can_be_repeated_or_left_out():
    batch, meta_batch = data()
    with pytest.raises(MetaKDError, match="verify is 0"):
        balanced(Setup(Hidden().double(), HARD_AND_SMOOTH), verify=0)
    balanced(Setup(Hidden().double(), HARD_AND_SMOOTH), verify=False)(batch, meta_batch)

    class BreaksLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.hidden = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)), Hidden.Foreign()
            self.hidden.generator = None

        def forward(self, x: Tensor) -> Tensor:
            noise = 0.0 if self.hidden.generator is None else torch.rand(x.shape, generator=self.hidden.generator)
            return self.net(x + noise)

    for verify, fails in ((True, False), (3, True)):
        student = BreaksLater().double()
        balancer = balanced(Setup(student, HARD_AND_SMOOTH), verify=verify)
        balancer(batch, meta_batch)
        student.hidden.generator = torch.Generator().manual_seed(0)
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)
        if fails:
            with pytest.raises(MetaKDError, match="other losses"):
                balancer(batch, meta_batch)
        else:
            balancer(batch, meta_batch)
