"""Forward mode against reverse mode: every fault is found, with the term and the layer, and no honest network is."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metakd import BilevelLossBalancer, MetaKDError
from metakd.estimators import FiniteDifference, IdentityJacobian, Memory, OneStep
from metakd.estimators.influence import influence
from metakd.estimators.tolerance import full_float32, tolerance
from metakd.estimators.verification import Disagreement, compare_influence
from metakd.inner import apply
from metakd.terms import CrossEntropy
from tests.estimators.problems import relative
from tests.estimators.weighted import CLASSES, data, hard, mlp, soft, weighted_problem
from tests.zoo import CHECKPOINTS_HAVE_FORWARD_MODE, ZOO


def direction(problem):
    """The step's own: -lr times the outer gradient after it."""
    ahead, _ = apply(
        problem.optimizer(problem.meta_params),
        problem.inner_gradient(problem.params, 0),
        problem.optimizer_state,
        problem.params,
    )
    _, gradient, _ = problem.outer_gradients(ahead)
    return {name: -0.1 * g for name, g in gradient.items() if g is not None}


def compared(problem):
    u = direction(problem)
    tangent = influence(problem.weighted, problem.params, 0, u)
    return compare_influence(problem, problem.params, 0, u, tangent)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Reversed(torch.autograd.Function):
    """Gradient reversal; forward mode knows the function alone."""

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return -g

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


def reversed_by_hook(x):
    y = x * 1
    if y.requires_grad:
        y.register_hook(torch.neg)
    return y


@torch.library.custom_op("metakd_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    """Torch drops the tangents of custom operations with a formula for reverse mode alone."""
    return x * 1.3


scaled.register_autograd(lambda ctx, g: g * 1.3)


FAULTS = {"function": Reversed.apply, "hook": reversed_by_hook, "dropped": lambda x: x + 0.5 * scaled(x)}


def deep(at, function, dtype=torch.float64, width=16):
    """Eight layers, named "0" to "7"; the function stands before layer `at`."""
    parts = []
    for i in range(8):
        layer = [nn.Linear(4 if i == 0 else width, width), nn.Tanh()]
        parts.append(nn.Sequential(*([Layer(function)] if i == at else []), *layer))
    return nn.Sequential(*parts, nn.Linear(width, CLASSES)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize("function", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_with_its_layer(function, at, dtype):
    problem = weighted_problem(deep(at, function, dtype), *data(dtype=dtype))
    found = compared(problem)
    assert found is not None and found.error > 0
    assert found.layer == f"{at - 1}.{0 if at - 1 != at else 1}"


def test_a_fault_in_one_term_is_found_with_its_term():
    def faulty(z, y):
        return hard(z.detach() + Reversed.apply(z) - z.detach(), y)

    found = compared(weighted_problem(mlp(), *data(), terms=(soft, faulty)))
    assert found is not None and found.term == "faulty"
    assert found.layer == "2"  # the last there is
    assert 0.1 < found.error <= 2
    assert "the term 'faulty'" in str(found) and "at or after '2'" in str(found)


def test_what_cancels_or_stands_still_is_no_fault():
    problem = weighted_problem(mlp(), *data())
    still = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    tangent = influence(problem.weighted, problem.params, 0, still)
    assert compare_influence(problem, problem.params, 0, still, tangent) is None
    constant = weighted_problem(mlp(), *data(), terms=(soft, lambda z, y: (z - z).sum(1)))
    assert compared(constant) is None


def test_a_wrong_tangent_of_one_sample_is_found():
    problem = weighted_problem(mlp(), *data())
    u = direction(problem)
    tangent = influence(problem.weighted, problem.params, 0, u)
    assert compare_influence(problem, problem.params, 0, u, tangent) is None
    tangent[3, 1] *= 1.01
    found = compare_influence(problem, problem.params, 0, u, tangent)
    assert found is not None and found.term == "soft"


def norms(depth, act, norm=True):
    layers = [nn.Linear(4, 16)]
    for _ in range(depth):
        layers += [nn.Linear(16, 16), *([nn.BatchNorm1d(16)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(16, CLASSES))


HONEST = {
    "deep batch norm, relu": lambda: norms(30, nn.ReLU),
    "deep batch norm, tanh": lambda: norms(30, nn.Tanh),
    "deep relu": lambda: norms(10, nn.ReLU, norm=False),
    "dead": lambda: nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(5.0, 6.0), nn.Linear(8, CLASSES)),
    "dropout": lambda: mlp(nn.Dropout(0.5)),
    "checkpoint": lambda: mlp(Layer(lambda x: checkpoint(torch.sin, x, use_reentrant=False))),
    "stopped": lambda: mlp(Layer(lambda x: x.detach() * x)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("name", [name for name in HONEST if name != "checkpoint" or CHECKPOINTS_HAVE_FORWARD_MODE])
def test_an_honest_network_raises_no_alarm(name, size, dtype):
    torch.manual_seed(size)
    assert compared(weighted_problem(HONEST[name]().to(dtype), *data(size, dtype=dtype))) is None


# Those that need a balancer's kernels, or whose inputs are no numbers.
OTHERS = {
    "lstm",
    "lstm_dropout",
    "gru",
    "fused_attention",
    "weight_norm",
    "compiled_part",
    "tied_embedding",
    "moving_centre",
} | {
    "batch_norm_eval"  # whose tangents are float32 under autocast
}
ANIMALS = [name for name, animal in ZOO.items() if animal.forward_mode and name not in OTHERS]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ANIMALS)
@pytest.mark.filterwarnings("ignore:.*spectral norm")
def test_no_animal_raises_an_alarm_in_float32_or_under_autocast(name, autocast):
    torch.manual_seed(1)
    module, x = ZOO[name].build().float(), ZOO[name].inputs(5).float()
    assert compared(weighted_problem(module, x, torch.arange(5) % 3, terms=(hard,), autocast=autocast)) is None


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("estimator", [OneStep(), IdentityJacobian()], ids=str)
def test_auto_takes_reverse_mode_for_this_model_from_then_on(kind, estimator):
    problem = weighted_problem(deep(4, FAULTS[kind]), *data(), memory=Memory(compare=True))
    with pytest.warns(UserWarning, match=r"forward mode is wrong on this model, .*'3\.0'.*reverse mode") as caught:
        found = [estimator(problem).gradient for _ in range(2)]
    assert len(caught) == 1
    assert problem.memory == Memory(forward_mode=False)
    expected = OneStep("reverse")(problem).gradient
    assert all(relative(one, expected) < 1e-12 for one in found)


def test_forward_mode_by_name_is_refused():
    problem = weighted_problem(deep(4, Reversed.apply), *data(), memory=Memory(compare=True))
    with pytest.raises(MetaKDError, match=r"OneStep\(mode='forward'\) fails: forward mode is wrong .*'3\.0'"):
        OneStep("forward")(problem)


def test_without_a_comparison_nothing_is_said():
    problem = weighted_problem(deep(4, Reversed.apply), *data())
    assert relative(OneStep()(problem).gradient, OneStep("reverse")(problem).gradient) > 1e-3


def test_the_memorys_tolerance_counts():
    problem = weighted_problem(deep(4, Reversed.apply), *data(), memory=Memory(compare=True, tolerance=1e3))
    OneStep()(problem)
    assert problem.memory.forward_mode is None


def straight_through(x):
    return x + (x.sign() - x).detach()


@pytest.mark.parametrize("sides", [1, 2])
def test_finite_differences_say_where_they_are_something_else(sides):
    student = nn.Sequential(nn.Linear(4, CLASSES), Layer(straight_through)).double()
    problem = weighted_problem(student, *data(), memory=Memory(compare=True))
    with pytest.warns(UserWarning, match=r"FiniteDifference differs from autograd: .*straight-through") as caught:
        for _ in range(2):
            FiniteDifference(sides=sides)(problem)
    assert len(caught) == 1 and not problem.memory.compare


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sides", [1, 2])
def test_finite_differences_of_smooth_losses_say_nothing(sides, dtype):
    problem = weighted_problem(mlp(Layer(torch.sin), dtype=dtype), *data(dtype=dtype), memory=Memory(compare=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FiniteDifference(sides=sides)(problem)


def test_the_comparison_leaves_the_generators_alone():
    problem = weighted_problem(mlp(), *data())
    before = torch.get_rng_state()
    compared(problem)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float64, 1.49e-7), (torch.float32, 3.45e-3), (torch.bfloat16, 0.3), (torch.float16, 0.3)],
)
def test_the_tolerance_follows_the_dtype(dtype, value):
    assert tolerance(dtype) == pytest.approx(value, rel=1e-2)
    assert tolerance(torch.float32, "cuda") in (tolerance(torch.float32), 0.3)  # TF32, or not


def test_a_disagreement_reads_well():
    assert str(Disagreement(3e-4, None, None)) == "the influence of all terms together is off by 3.0e-04 of its size"


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_comparisons_are_not_rounded_to_tf32(products):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(products)
    try:
        with full_float32() as rounded:
            assert rounded is (products != "highest" or (before[1] and torch.cuda.is_available()))
            assert torch.get_float32_matmul_precision() == "highest"
            assert tolerance(torch.float32, "cuda") < 0.01 or not rounded
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (products, before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_fault_is_found_on_a_gpu_that_rounds_to_tf32(at):
    x, y = (value.cuda() for value in data(dtype=torch.float32))
    student = deep(at, Reversed.apply, torch.float32).cuda()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, {"hard": CrossEntropy()}, optimizer=optimizer, estimator=OneStep())
    balancer.to("cuda")
    with pytest.warns(UserWarning, match="forward mode is wrong on this model"):
        balancer((x, y), (x.flip(0), y.flip(0)))
