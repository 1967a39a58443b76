"""`hypergradient` changes nothing that it is given, returns detached results, and names what does not fit."""

import copy

import pytest
import torch
import torchopt
from hypothesis import given, settings
from torch import Tensor

from metakd import Hypergradient, MetaKDError, hypergradient
from metakd.batch import map_tensors, tensors
from metakd.estimators import Adjoint, OneStep, Unroll
from tests.estimators.problems import Bilevel, problems, relative

ESTIMATORS = [Adjoint(), OneStep("forward"), OneStep("reverse"), OneStep(), Unroll()]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def frozen_look(value):
    """A value's tensors as copies, with all that could be changed about them."""
    return [(id(t), t._version, t.requires_grad, t.grad, t.clone()) for t in tensors(value)]


def assert_untouched(value, before):
    for (*seen, values), t in zip(before, tensors(value), strict=True):
        assert seen == [id(t), t._version, t.requires_grad, t.grad]
        assert torch.equal(values, t)


@settings(deadline=None, max_examples=20)
@given(problems())
def test_nothing_that_is_passed_in_is_changed(problem):
    inner, outer, params, meta_params, batches = problem.arguments()
    optimizer = problem.torchopt()
    state = hypergradient(inner, outer, params, meta_params, batches, optimizer=optimizer).optimizer_state
    everything = (params, meta_params, batches, state)
    order = list(params), list(meta_params)
    before, rng = frozen_look(everything), torch.get_rng_state()
    for estimator in ESTIMATORS:
        found = hypergradient(
            inner,
            outer,
            params,
            meta_params,
            batches,
            optimizer=optimizer,
            optimizer_state=state,
            estimator=estimator,
        )
        assert_untouched(everything, before)
        assert (list(params), list(meta_params)) == order
        assert torch.equal(rng, torch.get_rng_state())
        assert not any(t.requires_grad or t.grad_fn for t in tensors(found))


@each_estimator
def test_leaves_with_gradients_keep_them(estimator):
    problem = Bilevel(rule="momentum")
    for values in (problem.params, problem.meta_params):
        for name, value in values.items():
            values[name] = torch.nn.Parameter(value)
            values[name].grad = torch.ones_like(value)
            values[name].register_hook(lambda g: pytest.fail("a hook of the user's ran"))
    before = frozen_look((problem.params, problem.meta_params))
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    assert_untouched((problem.params, problem.meta_params), before)
    assert not any(t.requires_grad for t in tensors(found))
    assert relative(found.gradient, Bilevel(rule="momentum").double_backward().gradient) < 1e-10


@each_estimator
def test_it_works_where_gradients_are_switched_off_and_leaves_them_off(estimator):
    problem = Bilevel()
    with torch.no_grad():
        found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
        assert not torch.is_grad_enabled()
    assert relative(found.gradient, problem.double_backward().gradient) < 1e-10


@each_estimator
def test_the_same_call_gives_the_same_answer_with_the_same_optimizer_object(estimator):
    """TorchOpt's sgd(momentum=) remembers in a closure that it was called."""
    problem = Bilevel(rule="momentum")
    optimizer = problem.torchopt()
    first, second = (hypergradient(*problem.arguments(), optimizer=optimizer, estimator=estimator) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_the_default_is_adjoint():
    problem = Bilevel(steps=3, rule="adam")
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt())
    default = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=Adjoint())
    assert isinstance(found, Hypergradient)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(default), strict=True))


@each_estimator
def test_shapes_and_names_are_those_of_the_arguments(estimator):
    problem = Bilevel(unused=True, losses=3, dtype=torch.float32)
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    for values, like in ((found.gradient, problem.meta_params), (found.params, problem.params)):
        assert list(values) == list(like)
        assert all(values[name].shape == like[name].shape for name in like)
    assert found.outer_loss.shape == ()
    assert torch.equal(found.params["unused"], problem.params["unused"])


@each_estimator
def test_a_meta_parameter_that_nothing_feels_gets_zero_beside_others(estimator):
    problem = Bilevel()
    problem.meta_params["spare"] = torch.ones(2, 3, dtype=torch.float64)
    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    assert torch.equal(found.gradient["spare"], torch.zeros(2, 3, dtype=torch.float64))


@each_estimator
def test_a_loss_of_shape_one_is_a_scalar(estimator):
    problem = Bilevel()
    inner, outer, *others = problem.arguments()
    found = hypergradient(
        lambda *a: inner(*a).reshape(1),
        lambda *a: outer(*a).reshape(1, 1),
        *others,
        optimizer=problem.torchopt(),
        estimator=estimator,
    )
    assert found.outer_loss.shape == ()
    assert relative(found.gradient, problem.double_backward().gradient) < 1e-10


@each_estimator
def test_an_outer_loss_that_feels_the_meta_parameters_alone(estimator):
    problem = Bilevel()
    inner, _, *others = problem.arguments()
    found = hypergradient(
        inner,
        lambda p, m: m["mix"].pow(2).sum() / 2,
        *others,
        optimizer=problem.torchopt(),
        estimator=estimator,
    )
    assert torch.equal(found.gradient["mix"], problem.meta_params["mix"])


def line(**changes):
    """A small valid call, with some arguments replaced."""
    arguments = {
        "inner": lambda p, m, batch: (m["phi"] * p["x"] ** 2).sum(),
        "outer": lambda p, m: p["x"].sum(),
        "params": {"x": torch.tensor([1.0, 2.0])},
        "meta_params": {"phi": torch.tensor([0.5, 0.5])},
        "batches": [None],
        "optimizer": torchopt.sgd(lr=0.1),
        **changes,
    }
    return hypergradient(**arguments)


@each_estimator
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"params": {}}, "params is empty"),
        ({"params": [torch.ones(2)]}, "params is a list; give a dict"),
        ({"meta_params": {"a": {}}}, r"meta_params\['a'\] is empty"),
        ({"batches": 5}, r"batches is 5; give a list .*range\(5\)"),
        ({"batches": "abc"}, "batches is 'abc'; give a list"),
        ({"batches": {"x": torch.ones(2)}}, "batches is a dict; give a list"),
        ({"outer_batches": 2}, "outer_batches is 2; give a list"),
        ({"inner": None}, "inner must be a function that returns a loss, got NoneType"),
        ({"outer": torch.ones(2)}, "outer must be a function that returns a loss, got Tensor"),
        ({"params": {"x": torch.eye(2).to_sparse()}}, r"params\['x'\] is sparse \(torch.sparse_coo\)"),
        ({"params": {"x": torch.tensor([1, 2])}}, r"params\['x'\] is torch.int64"),
        ({"params": {"x": [1.0, 2.0]}}, r"params\['x'\] is list"),
        ({"meta_params": {"phi": torch.tensor([1, 2])}}, r"meta_params\['phi'\] is torch.int64"),
        ({"meta_params": {"phi": 0.5}}, r"meta_params\['phi'\] is float"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
            "must be a torchopt GradientTransformation .* got SGD; .*inner='mirror'",
        ),
        ({"optimizer": "sgd"}, "must be a torchopt GradientTransformation .* got str"),
        ({"inner": lambda p, m, batch: m["phi"] * p["x"]}, r"the inner loss.* scalar tensor, got \(2,\)"),
        ({"inner": lambda p, m, batch: (1j * m["phi"] * p["x"]).sum()}, "the inner loss.* is complex .*take its .abs"),
        ({"inner": lambda p, m, batch: 1.0}, "the inner loss.* scalar tensor, got float"),
        ({"outer": lambda p, m: p["x"]}, r"the outer loss.* scalar tensor, got \(2,\)"),
        ({"inner": lambda p, m, batch: (p["x"] * m["phi"]).sum() * float("nan")}, "the inner loss.* is nan"),
        ({"inner": lambda p, m, batch: (p["x"] * m["phi"]).sum() * float("inf")}, "the inner loss.* is inf"),
        ({"outer": lambda p, m: p["x"].sum() * float("nan")}, "the outer loss is nan"),
        (
            {"inner": lambda p, m, batch: ((m["phi"] * p["x"] - torch.tensor([0.5, 1.0])) ** 1.5).sum()},
            r"the hypergradient of 'phi' has 2 NaN or infinite entries of 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(estimator, changes, message):
    with pytest.raises(MetaKDError, match=message):
        line(estimator=estimator, **changes)


def test_the_small_call_is_valid_itself():
    assert torch.equal(line().gradient["phi"], torch.tensor([-0.2, -0.4]))


def test_an_estimator_of_the_users_own():
    """Anything that takes a problem and owes an answer; it finds detached values and a repaired optimizer."""
    problem = Bilevel(rule="momentum")
    problem.params["scale"] = torch.nn.Parameter(problem.params["scale"])

    def estimator(given):
        assert not any(t.requires_grad for t in tensors((given.params, given.meta_params)))
        assert [step.batch for step in given.batches] == problem.batches
        assert given.first_gradient is None and given.weighted is None and given.wants_params_gradient
        return Unroll()(given)

    found = hypergradient(*problem.arguments(), optimizer=problem.torchopt(), estimator=estimator)
    assert relative(found.gradient, problem.double_backward().gradient) < 1e-10


def test_results_can_be_copied_and_saved():
    found = line(optimizer=torchopt.sgd(lr=0.1, momentum=0.9))
    again = copy.deepcopy(found)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(again), strict=True))
    assert isinstance(map_tensors(Tensor.double, found), Hypergradient)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Unroll, r"estimator is the class Unroll; give an object of it, Unroll\(\)"),
        ("unroll", r"estimator is 'unroll'; give an object such as estimators\.Adjoint\(\)"),
        (3, "estimator is 3"),
    ],
)
def test_an_estimator_is_an_object(estimator, message):
    with pytest.raises(MetaKDError, match=message):
        line(estimator=estimator)
