"""`OneStep(parameters=...)`: the exact hypergradient of a step that moves no more than those, and for less."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import given, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, hypergradient, terms
from metakd.batch import tensors
from metakd.estimators import OneStep, Unroll
from metakd.estimators.subset import matching
from tests.estimators.problems import RULES, Bilevel, problems, relative, step
from tests.slow import slow_but
from tests.zoo import QUIET, ZOO, meet

MODES = ("auto", "forward", "reverse")
pytestmark = QUIET


def by_hand(problem, moving):
    """A double backward through one step that has gradients of these parameters alone."""
    params = {name: p.clone().requires_grad_(name in moving) for name, p in problem.params.items()}
    meta = {name: p.clone().requires_grad_() for name, p in problem.meta_params.items()}
    loss = problem.inner(params, meta, problem.batches[0])
    found = torch.autograd.grad(loss, [params[name] for name in moving], create_graph=True, allow_unused=True)
    gradients = dict(zip(moving, found, strict=True))
    ahead, _ = step(RULES[problem.rule], list(params.values()), [gradients.get(name) for name in params], None, 0)
    ahead = dict(zip(params, ahead, strict=True))
    gradient = torch.autograd.grad(problem.outer(ahead, meta), list(meta.values()), allow_unused=True)
    zeros = [torch.zeros_like(m) if g is None else g for g, m in zip(gradient, meta.values(), strict=True)]
    return dict(zip(meta, zeros, strict=True)), {name: p.detach() for name, p in ahead.items()}


def by_one_step(problem, moving, mode="auto"):
    estimator = OneStep(mode, parameters=moving)
    return hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)


@settings(deadline=None, max_examples=60)
@given(problems(), st.data())
def test_it_is_the_double_backward_with_the_others_frozen(problem, data):
    names = [name for name in problem.params if name != "unused"]
    moving = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    gradient, params = by_hand(problem, moving)
    for mode in MODES:
        found = by_one_step(problem, moving, mode)
        assert relative(found.gradient, gradient) < 1e-10, mode
        assert list(found.params) == list(problem.params)
        assert relative(found.params, params) < 1e-12, mode
        assert all(torch.equal(found.params[name], problem.params[name]) for name in params if name not in moving)


def test_all_parameters_are_no_subset():
    problem = Bilevel(rule="clip, adam")
    whole = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=OneStep())
    assert relative(by_one_step(problem, ["*"]).gradient, whole.gradient) < 1e-12
    assert relative(by_one_step(problem, ["w10.*"]).gradient, whole.gradient) > 1e-2


class MovesAll(OneStep):
    """Another problem's answer."""

    def __call__(self, problem):
        return OneStep()(problem)


@pytest.mark.parametrize("rule", ["momentum", "clip, adam"])
def test_finite_differences_agree(rule):
    problem = Bilevel(rule=rule, seed=3)
    estimator = OneStep(parameters=["w10.weight", "scale"])
    check_hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    with pytest.raises(MetaKDError, match="differs from central finite differences"):
        check_hypergradient(
            *problem.arguments(), optimizer=problem.torchopt(), estimator=MovesAll(parameters=["w10.weight", "scale"])
        )


def test_the_state_of_the_others_stays():
    problem = Bilevel(rule="momentum")
    buffers = tensors(by_one_step(problem, ["w2"]).optimizer_state)
    moved = [name for name, buffer in zip(sorted(problem.params), buffers, strict=True) if buffer.any()]
    assert moved == ["w2"]


@pytest.mark.parametrize("pattern", ["layer.w", "layer/w", "*.w", "l*"])
def test_levels_of_nested_parameters_are_joined_by_dots(pattern):
    params = {"layer": {"w": torch.tensor(3.0)}, "other": torch.tensor(1.0)}
    found = hypergradient(
        lambda p, m, batch: m["phi"] * (p["layer"]["w"] * p["other"]) ** 2 / 2,
        lambda p, m: (p["layer"]["w"] + 10 * p["other"]) ** 2 / 2,
        params,
        {"phi": torch.tensor(2.0)},
        [None],
        optimizer=torchopt.sgd(lr=0.1),
        estimator=OneStep(parameters=[pattern]),
    )
    torch.testing.assert_close(found.gradient["phi"], torch.tensor(-0.3 * 12.4))  # -0.1 w other^2 (w' + 10 other)
    torch.testing.assert_close(found.params, {"layer": {"w": torch.tensor(2.4)}, "other": torch.tensor(1.0)})


def test_patterns_that_fit_nothing_name_the_parameters_there_are():
    with pytest.raises(MetaKDError, match=r"named 'head\.\*'.*\['w10\.weight', 'w10\.bias', 'w2', 'scale'\]"):
        by_one_step(Bilevel(), ["w2", "head.*"])
    assert matching(["a.b", "a/c", "d"], ["d", "a.*"]) == ["a.b", "a/c", "d"]


@pytest.mark.parametrize("parameters", ["w2", [], ()])
def test_parameters_are_some_patterns(parameters):
    with pytest.raises(MetaKDError, match="parameters must be patterns"):
        OneStep(parameters=parameters)


def test_a_list_of_patterns_has_a_hash():
    assert hash(OneStep(parameters=["w2"])) == hash(OneStep(parameters=("w2",)))


def balanced(student, estimator, **options):
    torch.manual_seed(7)  # of the weight model
    params = [p for p in student.parameters() if p.requires_grad]
    return BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=torch.optim.SGD(params, lr=0.3, momentum=0.9),
        inner="mirror",
        estimator=estimator,
        **options,
    )


@pytest.mark.filterwarnings("ignore:.*no forward-mode derivative")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("share", slow_but([0.5], [0.5, 0.8]))
@pytest.mark.parametrize("name", ZOO)
def test_animals_agree_with_themselves_frozen(name, share, accumulate):
    """Influences, losses and the user's gradients: those of the frozen animal, and of the whole one."""
    student, batch, meta_batch = meet(name)
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    moving = names[int(share * len(names)) :]
    if name == "unused_and_frozen":
        moving = ["used.*"]
    frozen, whole = copy.deepcopy(student), copy.deepcopy(student)
    for key, p in frozen.named_parameters():
        p.requires_grad_(p.requires_grad and (key in moving or key.startswith("used.")))
    found = []
    for animal, estimator in (
        (student, OneStep(parameters=moving)),
        (frozen, Unroll()),
        (whole, OneStep()),
    ):
        balancer = balanced(animal, estimator, accumulate=accumulate)
        torch.manual_seed(11)  # dropout
        balancer(batch, meta_batch).backward()
        found.append((balancer.report.influence, {key: p.grad for key, p in animal.named_parameters()}))
    (ours, gradients), (expected, _), (_, of_whole) = found
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    if accumulate == 2:  # the weights are the same, so is the step
        torch.testing.assert_close(gradients, of_whole, rtol=1e-9, atol=1e-12)
    assert {key for key, g in gradients.items() if g is not None} == {k for k, g in of_whole.items() if g is not None}


class Calls(TorchDispatchMode):
    """Counts the forward and backward convolutions and batch normalisations."""

    def __init__(self):
        super().__init__()
        self.number = dict.fromkeys(("convolution", "convolution_backward", "native_batch_norm"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").removesuffix(".default")
        if name in self.number:
            self.number[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("accumulate", "lookahead"), [(1, 1), (2, 3)])
def test_passes_end_and_begin_at_the_first_layer_that_moves(accumulate, lookahead):
    layers = [part for i in range(3) for part in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())]
    student = nn.Sequential(*layers, nn.Flatten(), nn.Linear(50, 3)).double()
    _, batch, meta_batch = meet("batch_norm")
    estimator = OneStep("forward", parameters=["6.*", "10.*"])
    balancer = balanced(student, estimator, accumulate=accumulate, verify=False)
    with Calls() as calls:
        balancer(batch, meta_batch)
    # Three in the training pass, three for the meta batch, three in the forward-mode pass; the tangent of the third's.
    assert calls.number["convolution"] == 3 + 3 + 3 + 2
    # The lookahead's gradient serves the real step where the weight model stays; the meta loss's ends at the layer.
    assert calls.number["convolution_backward"] == lookahead + 1
    assert calls.number["native_batch_norm"] == 3 + 3 + 3


class Watched(nn.Module):
    """Reads the statistics that its first layer has just updated, and writes over what a layer gave."""

    def __init__(self):
        super().__init__()
        self.norm, self.body, self.head = nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.body(self.norm(x))
        again = h + h
        F.relu(h, inplace=True)
        return self.head((again - h).mul_(0.5)) + self.norm.running_mean.sum() ** 2 * self.head.bias


class Pooled(nn.Module):
    """Calls a function first for two results, then for one."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(2, 3)

    def forward(self, x):
        h, _ = F.max_pool2d(self.body(x)[None], (1, 2), return_indices=True)
        return self.head(F.max_pool2d(h, (1, 2))[0])


@pytest.mark.parametrize(
    ("student", "moving"), [(Watched, "head.*"), (Watched, "body.bias"), (Pooled, "head.*")], ids=str
)
def test_what_layers_before_it_do_besides(student, moving):
    influences = []
    _, batch, meta_batch = meet("linear")
    for mode in ("forward", "reverse"):
        torch.manual_seed(0)
        balancer = balanced(student().double(), OneStep(mode, parameters=[moving]))
        balancer(batch, meta_batch)
        influences.append(balancer.report.influence)
    torch.testing.assert_close(*influences, rtol=1e-10, atol=1e-13)
