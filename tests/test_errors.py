"""Bad input: a `MetaKDError` that names cause and cure, and nothing of the user's is changed."""

import copy

import pytest
import torch
import torchopt
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, estimators, terms, weighting
from tests.tally import Tally
from tests.test_no_trace import assert_same, trace_of
from tests.zoo import meet


def parts(name="batch_norm"):
    student, batch, meta_batch = meet(name)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    return student, optimizer, batch, meta_batch


class Answers(nn.Module):
    """A weight model that answers with a function of its one parameter."""

    def __init__(self, answer):
        super().__init__()
        self.free = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.answer = answer

    def forward(self, features, batch):
        return self.answer(self.free, features)


class Linear(nn.Linear):
    """A weight model in float32."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, features, batch):
        return super().forward(features)


def fails_after(calls, error):
    """A term that works `calls` times."""
    done = Tally()

    def term(outputs, batch):
        done(1)
        if len(done.seen) > calls:
            raise error
        return terms.CrossEntropy()(outputs, batch)

    return term


def nan_term(outputs, batch):
    return outputs.sum(1) * torch.tensor([1.0] * (len(outputs) - 1) + [float("nan")])


HARD = {"hard": terms.CrossEntropy()}
X, Y = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
GOOD = (X, Y)

CALLS = {
    "scalar term": (dict(terms={"mean": lambda z, b: z.mean()}), GOOD, GOOD, r"'mean' returned shape \(\).*reduction='none'"),
    "wide term": (dict(terms={"wide": lambda z, b: z}), GOOD, GOOD, r"'wide' returned shape \(5, 3\), expected \(5,\)"),
    "term raises": (dict(terms={"odd": lambda z, b: {}["x"]}), GOOD, GOOD, r"'odd' raised KeyError"),
    "nan loss": (dict(terms={"sick": nan_term}), GOOD, GOOD, r"'sick' is nan for sample 4 of the batch"),
    "no teacher": (dict(terms=[terms.SoftTarget()]), GOOD, GOOD, r"teacher's outputs are missing.*teacher="),
    "empty meta batch": ({}, GOOD, (X[:0], Y[:0]), r"the meta batch is empty \(batch size 0\)"),
    "empty batch": ({}, (X[:0], Y[:0]), GOOD, r"the batch is empty"),
    "lengths differ": ({}, (X, Y[:4]), GOOD, r"inputs of shape \(5, 2, 5, 5\) but 4 targets"),
    "label too large": ({}, (X, Y + 1), GOOD, r"'hard': label 3 is out of range \[0, 3\)"),
    "negative label": ({}, (X, Y - 1), GOOD, r"label -1 is out of range"),
    "meta label": ({}, GOOD, (X, Y + 5), r"'meta_loss': label 7 is out of range"),
    "float labels": ({}, (X, Y.double()), GOOD, r"integer class indices"),
    "inputs of another dtype": ({}, (X.float(), Y), GOOD, r"parameters are torch.float64, its inputs torch.float32"),
    "meta inputs of another dtype": ({}, GOOD, (X.float(), Y), r"parameters are torch.float64, its inputs"),
    "inputs on another device": ({}, (X.to("meta"), Y), GOOD, r"inputs on meta|on meta"),
    "item not understood": ({}, "a string", GOOD, r"item of type str is not understood"),
    "meta loss fails": (dict(meta_loss=lambda z, b: z["x"]), GOOD, GOOD, r"'meta_loss' raised"),
    "meta loss nan": (dict(meta_loss=nan_term), GOOD, GOOD, r"'meta_loss' is nan for sample 4 of the meta batch"),
    "features of wrong shape": (dict(features=lambda losses, z, b: losses.sum()), GOOD, GOOD, r"features function.*\(B, F\)"),
    "features raise": (dict(features=lambda losses, z, b: 1 / 0), GOOD, GOOD, r"raised ZeroDivisionError"),
    "features nan": (dict(features=lambda losses, z, b: losses / 0 - losses / 0), GOOD, GOOD, r"NaN or infinity for samples"),
    "weights of wrong shape": (dict(weighting=Answers(lambda p, f: p)), GOOD, GOOD, r"expected \(B, M\) = \(5, 1\)"),
    "weights nan": (dict(weighting=Answers(lambda p, f: p * f / 0)), GOOD, GOOD, r"NaN or infinite weights"),
    "weight model raises": (dict(weighting=Answers(lambda p, f: p.missing)), GOOD, GOOD, r"weight model raised AttributeError"),
    "weight model of another dtype": (dict(weighting=Linear()), GOOD, GOOD, r"weight model raised RuntimeError.*float64.*cast"),
    "weight model elsewhere": (dict(weighting=weighting.LossMLP(1, 1).to("meta")), GOOD, GOOD, r"on cpu and returns \(B, M\)"),
    "weights constant": (dict(weighting=Answers(lambda p, f: 0 * p + f)), GOOD, GOOD, r"exactly zero"),
    "weights detached": (dict(weighting=Answers(lambda p, f: f)), GOOD, GOOD, r"do not depend on any trainable"),
    "softmax over one term": (
        dict(weighting=weighting.LossMLP(1, 1, output="softmax").double()), GOOD, GOOD, r"saturated or constant"
    ),
    "meta loss ignores the student": (dict(meta_loss=lambda z, b: z.detach().sum(1)), GOOD, GOOD, r"hypergradient is zero"),
    "term fails in the replay": (dict(terms={"late": fails_after(1, ValueError("boom"))}), GOOD, GOOD, r"'late' raised ValueError: boom"),
    "batch_fn returns no batch": (dict(batch_fn=lambda item: 3), GOOD, GOOD, r"batch_fn must return a metakd.Batch"),
    "no index": (dict(weighting=weighting.SampleTable(9, 1).double()), GOOD, GOOD, r"index"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_failing_call_says_why_and_changes_nothing(case):
    options, batch, meta_batch, message = CALLS[case]
    student, optimizer, _, _ = parts()
    balancer = BilevelLossBalancer(
        student,
        options.get("terms", HARD),
        optimizer=optimizer,
        **{k: v for k, v in options.items() if k != "terms"},
    )
    before, state = trace_of(student, optimizer, balancer.weighting), balancer.state_dict()
    with pytest.raises(MetaKDError, match=message):
        balancer(batch, meta_batch)
    assert_same(trace_of(student, optimizer, balancer.weighting), before)
    assert_same(balancer.state_dict(), state)
    with pytest.raises(MetaKDError, match="no report yet"):
        _ = balancer.report


def test_causes_are_chained():
    student, optimizer, batch, meta_batch = parts()
    cause = ValueError("inside")

    def term(outputs, batch):
        raise cause

    balancer = BilevelLossBalancer(student, {"bad": term}, optimizer=optimizer)
    with pytest.raises(MetaKDError, match="'bad' raised ValueError: inside") as caught:
        balancer(batch, meta_batch)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError("full"), SystemExit])
@pytest.mark.parametrize("calls", [0, 1])
def test_interrupted_anywhere_everything_is_put_back(error, calls):
    student, optimizer, batch, meta_batch = parts()
    balancer = BilevelLossBalancer(student, {"hard": fails_after(calls, error)}, optimizer=optimizer)
    before = trace_of(student, optimizer, balancer.weighting)
    expected = MetaKDError if isinstance(error, Exception) else error
    with pytest.raises(expected):
        balancer(batch, meta_batch)
    assert_same(trace_of(student, optimizer, balancer.weighting), before)


@pytest.mark.parametrize("warm", [False, True])
def test_a_weight_model_that_steps_into_nan_is_put_back_with_its_optimizer(warm):
    student, optimizer, batch, meta_batch = parts()
    model = weighting.LossMLP(1, 1).double()
    weighting_optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    balancer = BilevelLossBalancer(
        student, HARD, optimizer=optimizer, weighting=model, weighting_optimizer=weighting_optimizer
    )
    if warm:
        balancer(batch, meta_batch)
    weighting_optimizer.param_groups[0]["lr"] = float("inf")
    before, state = trace_of(student, optimizer, model), balancer.state_dict()
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(MetaKDError, match="NaN or infinite weights"):
        balancer(batch, meta_batch)
    assert_same(trace_of(student, optimizer, model), before)
    assert_same(balancer.state_dict(), state)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_a_failing_meta_step_changes_nothing():
    student, optimizer, batch, meta_batch = parts()
    balancer = BilevelLossBalancer(
        student, {"late": fails_after(2, ValueError())}, optimizer=optimizer, estimator=estimators.Unroll()
    )
    before, state = trace_of(student, optimizer, balancer.weighting), balancer.state_dict()
    with pytest.raises(MetaKDError, match="'late' raised ValueError"):
        balancer.meta_step([batch] * 3, meta_batch)
    assert_same(trace_of(student, optimizer, balancer.weighting), before)
    assert_same(balancer.state_dict(), state)


@pytest.mark.parametrize(
    "options", [dict(inner=torchopt.sgd(lr=0.0)), dict(meta_loss=lambda z, b: 0 * z.sum(1))], ids=["rate", "flat"]
)
def test_an_influence_of_zero_is_right_and_said_once(options):
    student, optimizer, batch, meta_batch = parts()
    balancer = BilevelLossBalancer(student, HARD, optimizer=optimizer, **options)
    with pytest.warns(UserWarning, match=r"exactly zero: .*learning rate of 0"):
        balancer(batch, meta_batch)
    assert balancer(batch, meta_batch).requires_grad
    assert not balancer.report.influence.any() and balancer.report.hypergradient_norm == 0


def test_no_grad_is_named():
    student, optimizer, batch, meta_batch = parts()
    balancer = BilevelLossBalancer(student, HARD, optimizer=optimizer)
    with torch.no_grad(), pytest.raises(MetaKDError, match=r"outside torch.no_grad"):
        balancer(batch, meta_batch)
    with torch.no_grad():
        assert not balancer.loss(batch).requires_grad


def other():
    return nn.Linear(4, 3).double()


CONSTRUCTION = {
    "no terms": (lambda s, o: dict(terms={}), r"no terms"),
    "term not callable": (lambda s, o: dict(terms=[3]), r"cannot be called"),
    "another model's optimizer": (lambda s, o: dict(optimizer=torch.optim.SGD(other().parameters(), lr=0.1)), r"none of the student's.*another model"),
    "parameter missing": (lambda s, o: dict(optimizer=torch.optim.SGD([*s.parameters()][1:], lr=0.1)), r"1 trainable parameter\(s\).*'0.weight'.*requires_grad_\(False\)"),
    "unsupported optimizer": (lambda s, o: dict(optimizer=torch.optim.Rprop(s.parameters()), inner="mirror"), r"cannot follow Rprop; it supports torch.optim.SGD"),
    "not an optimizer": (lambda s, o: dict(optimizer=0.1), r"student's torch optimizer, .*got float"),
    "torchopt as optimizer": (lambda s, o: dict(optimizer=torchopt.sgd(lr=0.1)), r"student's torch optimizer"),
    "inner misspelt": (lambda s, o: dict(inner="sdg"), r"'sgd', 'mirror' or a torchopt.*'sdg'"),
    "estimator by name": (lambda s, o: dict(estimator="unroll"), r"estimator is 'unroll'; give an object"),
    "estimator class": (lambda s, o: dict(estimator=estimators.Unroll), r"the class Unroll; give an object of it, Unroll\(\)"),
    "accumulate": (lambda s, o: dict(accumulate=0), r"accumulate is 0, but must be an integer of at least 1"),
    "every": (lambda s, o: dict(every=1.5), r"every is .*, but must be an integer of at least 1"),
    "weighting no module": (lambda s, o: dict(weighting=lambda f, b: f), r"weighting must be an nn.Module"),
    "optimizer of the weight model alone": (lambda s, o: dict(weighting_optimizer=o), r"without weighting"),
    "foreign optimizer of the weight model": (lambda s, o: dict(weighting=weighting.LossMLP(1, 1), weighting_optimizer=o), r"none of the weight model's"),
    "frozen student": (lambda s, o: s.requires_grad_(False) and {}, r"trainable parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_a_balancer_that_cannot_be_built_says_why(case):
    student, optimizer, _, _ = parts()
    make, message = CONSTRUCTION[case]
    options = {"terms": HARD, "optimizer": optimizer} | make(student, optimizer)
    with pytest.raises(MetaKDError, match=message):
        BilevelLossBalancer(student, **options)


def test_default_features_say_how_to_do_without_class_labels():
    student, optimizer, (x, y), meta_batch = parts()
    teacher = copy.deepcopy(student)
    balancer = BilevelLossBalancer(student, [terms.SoftTarget()], optimizer=optimizer, teacher=teacher)
    with pytest.raises(MetaKDError, match=r"default features.*features=lambda"):
        balancer(Batch(x, y.double()), meta_batch)
    balancer(Batch(x), meta_batch)  # without labels these features are entropies


def test_one_step_does_not_pretend_to_take_more():
    student, optimizer, batch, meta_batch = parts()
    balancer = BilevelLossBalancer(student, HARD, optimizer=optimizer)
    with pytest.raises(MetaKDError, match=r"exactly one inner step, got 2 batches.*Adjoint"):
        balancer.meta_step([batch, batch], meta_batch)
    with pytest.raises(MetaKDError, match="at least one batch"):
        BilevelLossBalancer(student, HARD, optimizer=optimizer, estimator=estimators.Unroll()).meta_step([], meta_batch)
