"""What every recipe owes: any classifier, a report, exact resuming, options passed on, and clear refusals."""

import copy
import io

import pytest
import torch
from torch import nn

import metakd
from metakd import MetaKDError, check_hypergradient, estimators, recipes
from metakd._call.arguments import default_weighting
from metakd._virtual.functional import FunctionalStudent
from metakd.recipes.base import beside
from metakd.terms import CrossEntropy
from tests.recipes.by_hand import SAMPLES, meta_batch, student, teacher, train_batch

TERMS = {"hard": CrossEntropy(), "size": lambda outputs, batch: outputs.square().mean(1)}


def classes_of(model):
    return [p.shape[0] for p in model.parameters()][-1] if isinstance(model, nn.Module) else 3


RECIPES = {
    "amal": lambda s, t, o, **k: recipes.amal(s, t, optimizer=o, samples=SAMPLES, **k),
    "auto_balance": lambda s, t, o, **k: recipes.auto_balance(s, optimizer=o, classes=classes_of(s), **k),
    "auto_lambda": lambda s, t, o, **k: recipes.auto_lambda(s, TERMS, optimizer=o, primary="hard", **k),
    "bikd": lambda s, t, o, **k: recipes.bikd(s, t, optimizer=o, **k),
    "learning_to_reweight": lambda s, t, o, **k: recipes.learning_to_reweight(s, optimizer=o, **k),
    "meta_weight_net": lambda s, t, o, **k: recipes.meta_weight_net(s, optimizer=o, **k),
}
LEARNING = sorted({"amal", "auto_balance", "auto_lambda", "bikd", "meta_weight_net"})


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def iterate(balancer, model, optimizer, steps, classes=3):
    for t in steps:
        loss = balancer(train_batch(t, classes=classes), meta_batch(t, classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def test_all_are_here():
    assert sorted(RECIPES) == sorted(recipes.__all__) and metakd.recipes is recipes


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_any_number_of_classes(name, classes):
    model = student(classes)
    optimizer = sgd(model)
    balancer = RECIPES[name](model, teacher(classes), optimizer)
    losses = list(iterate(balancer, model, optimizer, range(6), classes))
    report = balancer.report
    assert report.losses.shape == report.weights.shape == report.influence.shape == (6, len(balancer.terms))
    assert report.weights.isfinite().all() and report.meta_loss > 0 and report.hypergradient_norm > 0
    assert all(loss >= 0 for loss in losses)
    assert all(p.dtype == torch.float64 for p in balancer.weighting.parameters())
    assert balancer.weights(train_batch(9, classes=classes)).shape == (6, len(balancer.terms))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_convolutional_student_in_float32(name):
    def network():
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)]
        return nn.Sequential(*layers)

    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    balancer = RECIPES[name](model, network(), optimizer)
    x, y = torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    loss = balancer((x, y, torch.arange(8)), (x[:5], y[:5]))
    loss.backward()
    assert balancer.report.weights.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_run_resumes_to_the_same_numbers(name):
    model, guide = student(), teacher()
    optimizer = sgd(model)
    balancer = RECIPES[name](model, guide, optimizer)
    list(iterate(balancer, model, optimizer, range(3)))
    other = student()
    other_optimizer = sgd(other)
    fresh = RECIPES[name](other, guide, other_optimizer)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, balancer)], saved)
    saved.seek(0)
    for part, state in zip((other, other_optimizer, fresh), torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert list(iterate(fresh, other, other_optimizer, range(3, 9))) == list(
        iterate(balancer, model, optimizer, range(3, 9))
    )


@pytest.mark.parametrize("name", LEARNING)
def test_hypergradients_agree_with_finite_differences(name):
    model = student()
    balancer = RECIPES[name](model, teacher(), sgd(model))
    check_hypergradient(balancer, [train_batch(0)], meta_batch(0), directions=2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_options_reach_the_balancer(name):
    model = student()
    balancer = RECIPES[name](model, teacher(), sgd(model), every=3, estimator=estimators.Unroll())
    assert balancer.every == 3 and balancer.estimator == estimators.Unroll()
    balancer(train_batch(0), meta_batch(0))
    assert balancer.report.influence is None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_the_recipe_decides_is_no_option(name):
    model = student()
    with pytest.raises(MetaKDError, match=rf"recipes\.{name} sets weighting itself; leave it out"):
        RECIPES[name](model, teacher(), sgd(model), weighting=nn.Linear(1, 1))


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), "fast"])
def test_a_rate_that_is_none(name, lr):
    model = student()
    with pytest.raises(MetaKDError, match=r"lr is .*finite and not negative"):
        RECIPES[name](model, teacher(), sgd(model), lr=lr)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_student_that_cannot_be_trained(name):
    optimizer = sgd(student())
    for bad in (teacher(), "resnet20", None):
        with pytest.raises(MetaKDError, match=r"student must be an nn\.Module|no trainable parameter"):
            RECIPES[name](bad, teacher(), optimizer)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_teacher_stays_as_it_is(name):
    model = student()
    guide = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    before = copy.deepcopy(guide.state_dict())
    balancer = RECIPES[name](model, guide, sgd(model))
    balancer(train_batch(0), meta_batch(0)).backward()
    assert guide.training and all(torch.equal(value, before[key]) for key, value in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())


DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_models_are_real_and_never_half_precise(dtype):
    model = nn.Linear(2, 2, dtype=dtype)
    for weighting in (beside(model, nn.Linear(3, 1)), default_weighting(FunctionalStudent(model), 2, 3)):
        assert {p.dtype for p in weighting.parameters()} == {DTYPES[dtype]}


class Spectral(nn.Module):
    """Complex parameters, real logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.complex128)

    def forward(self, x):
        return self.layer(x.to(torch.complex128)).abs()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_student_with_complex_parameters_has_real_weights(name):
    model = Spectral()
    balancer = RECIPES[name](model, teacher(), torch.optim.SGD(model.parameters(), lr=0.1))
    balancer.loss(train_batch(0)).backward()
    assert balancer.report.weights.dtype == torch.float64 and model.layer.weight.grad.is_complex()
    assert not any(p.is_complex() for p in balancer.weighting.parameters())


@pytest.mark.parametrize("name", ["amal", "bikd"])
def test_a_teacher_may_be_a_function(name):
    model, guide = student(), teacher()
    weights = []
    for judge in (guide, lambda x: guide.eval()(x)):
        torch.manual_seed(0)
        weights.append(RECIPES[name](model, judge, sgd(model)).loss(train_batch(0)))
    torch.testing.assert_close(*weights)
    with pytest.raises(MetaKDError, match=r"a list of 2 outputs.*torch\.stack\(batch\.teacher\)"):
        RECIPES[name](model, [guide, guide], sgd(model)).loss(train_batch(0))
