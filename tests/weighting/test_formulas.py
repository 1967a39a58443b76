"""Every weight model against its formula, and through the derivatives the library takes of it."""

import math
import pickle
import warnings
from copy import deepcopy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from metakd import BilevelLossBalancer, recipes
from metakd.batch import Batch
from metakd.weighting import (
    ClassAware,
    ClassTable,
    EntropyGate,
    GroupTable,
    LossMLP,
    Normalised,
    Rectified,
    SampleTable,
    TermScalars,
    entropies,
)
from metakd.weighting.base import default_optimizer

MAPS = {
    "sigmoid": lambda a: 1 / (1 + (-a).exp()),
    "softplus": lambda a: (1 + a.exp()).log(),
    "softmax": lambda a: a.exp() / a.exp().sum(1, keepdim=True),
    "identity": lambda a: a,
}
ROWS, TERMS = st.integers(1, 6), st.integers(1, 4)
EMPTY = Batch(None)


def batch_of(rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(size, (3, rows), generator=generator)
    return Batch(None, targets=pick[0], index=pick[1], columns={"source": pick[2]})


def models(output="softplus"):
    return [
        LossMLP(2, 3, hidden=(4,), output=output),
        TermScalars(3, init=0.5, output=output),
        ClassTable(5, 3, init=0.5, output=output),
        SampleTable(5, 3, init=0.5, output=output),
        GroupTable("source", 5, 3, init=0.5, output=output),
    ]


@given(
    ROWS,
    st.integers(1, 5),
    TERMS,
    st.sampled_from(list(MAPS)),
    st.sampled_from([(), (3,), (4, 2), (2, 3, 4)]),
)
def test_the_mlp_is_linear_tanh_layers_and_a_map(rows, features, terms, output, hidden):
    model = LossMLP(features, terms, hidden, output=output).double()
    x = torch.randn(rows, features, dtype=torch.float64)
    parameters = list(model.parameters())
    assert [tuple(p.shape) for p in parameters[::2]] == list(zip((*hidden, terms), (features, *hidden), strict=True))
    a = x
    for layer in range(0, len(parameters), 2):
        a = a @ parameters[layer].T + parameters[layer + 1]
        if layer < len(parameters) - 2:
            a = (a.exp() - (-a).exp()) / (a.exp() + (-a).exp())
    torch.testing.assert_close(model(x, EMPTY), MAPS[output](a), rtol=1e-10, atol=1e-12)


def test_the_mlp_is_the_papers_by_default():
    sizes = [tuple(p.shape) for p in LossMLP(2, 2).parameters()]
    assert sizes == [(64, 2), (64,), (64, 64), (64,), (2, 64), (2,)]
    model = LossMLP(2, 2)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(model(torch.rand(3, 2), EMPTY), torch.full((3, 2), 0.5))


@given(ROWS, TERMS, st.sampled_from(list(MAPS)), st.integers(0, 99))
def test_rows_are_looked_up(rows, terms, output, seed):
    batch, features = batch_of(rows, 7, seed), torch.zeros(rows, 1)
    for table, index in ((ClassTable(7, terms, init=0.5, output=output), batch.targets),
                         (SampleTable(7, terms, init=0.5, output=output), batch.index),
                         (GroupTable("source", 7, terms, init=0.5, output=output), batch.columns["source"]),
                         (GroupTable("targets", 7, terms, init=0.5, output=output), batch.targets)):  # fmt: skip
        torch.nn.init.normal_(table.free)
        torch.testing.assert_close(table(features, batch), MAPS[output](table.free[index]))
    scalars = TermScalars(terms, init=0.5, output=output)
    torch.nn.init.normal_(scalars.free)
    torch.testing.assert_close(scalars(features, batch), MAPS[output](scalars.free[None]).expand(rows, terms))


@given(st.floats(1e-6, 1e4))
def test_a_softplus_starts_where_it_is_told(init):
    starts_at(init, "softplus")


@given(st.floats(1e-6, 1 - 1e-6))
def test_a_sigmoid_starts_where_it_is_told(init):
    starts_at(init, "sigmoid")


@given(st.floats(1e-6, 1e4))
def test_bounded_weights_start_where_they_are_told_and_end_at_twice_that(init):
    starts_at(init, "bounded")
    for model in (f(init=init) for f in (scalars, classes, samples, sources)):
        for free, end in ((-200.0, 0.0), (200.0, 2 * init)):
            nn.init.constant_(model.free, free)
            weights = model(torch.zeros(2, 1), batch_of(2, 4))
            torch.testing.assert_close(weights, torch.full((2, 3), end))


@given(st.floats(-1e4, 1e4))
def test_an_identity_starts_where_it_is_told(init):
    starts_at(init, "identity")


def starts_at(init, output):
    for model in (f(init=init, output=output) for f in (scalars, classes, samples, sources)):
        weights = model(torch.zeros(2, 1), batch_of(2, 4))
        torch.testing.assert_close(weights, torch.full((2, 3), init), rtol=1e-5, atol=1e-9)


def scalars(**kwargs):
    return TermScalars(3, **kwargs)


def classes(**kwargs):
    return ClassTable(4, 3, **kwargs)


def samples(**kwargs):
    return SampleTable(4, 3, **kwargs)


def sources(**kwargs):
    return GroupTable("source", 4, 3, **kwargs)


@pytest.mark.parametrize("build", [scalars, classes, samples, sources])
def test_the_default_start_is_one(build):
    torch.testing.assert_close(build()(torch.zeros(2, 1), batch_of(2, 4)), torch.ones(2, 3))


@pytest.mark.parametrize("build", [scalars, classes, samples, sources])
@pytest.mark.parametrize("init", [None, 0.2, 7.0])
def test_a_softmax_starts_uniform(build, init):
    weights = build(init=init, output="softmax")(torch.zeros(2, 1), batch_of(2, 4))
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("output", list(MAPS))
@pytest.mark.parametrize("rows", [1, 4])
def test_derivatives_of_first_and_second_order(which, output, rows):
    torch.manual_seed(0)
    model = models(output)[which].double()
    names = [name for name, _ in model.named_parameters()]
    features, batch = torch.rand(rows, 2, dtype=torch.float64), batch_of(rows, 5)

    def weights(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (features, batch))

    parameters = [p.detach().normal_().requires_grad_() for p in model.parameters()]
    assert gradcheck(weights, parameters, check_forward_ad=True)
    assert gradgradcheck(weights, parameters)


@pytest.mark.parametrize("which", range(5))
def test_the_dtype_is_the_models(which):
    model, features, batch = models()[which], torch.rand(2, 2), batch_of(2, 5)
    narrow = model(features, batch)
    assert narrow.shape == (2, 3) and narrow.dtype == torch.float32
    wide = model.double()(features, batch)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), narrow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_another_dtype_are_taken(dtype):
    model, features = LossMLP(2, 3), torch.rand(4, 2).to(dtype)
    torch.testing.assert_close(model(features, EMPTY), model(features.float(), EMPTY), rtol=0, atol=0)


@pytest.mark.parametrize("which", range(5))
def test_autocast_does_not_cost_digits(which):
    model, features, batch = models()[which], torch.rand(2, 2), batch_of(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        weights = model(features, batch)
    torch.testing.assert_close(weights, model(features, batch), rtol=0, atol=0)


@pytest.mark.parametrize("which", range(5))
def test_models_are_copied_and_pickled(which):
    model, features, batch = models()[which], torch.rand(2, 2), batch_of(2, 5)
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(features, batch), model(features, batch), rtol=0, atol=0)


def test_indices_of_any_integer_dtype():
    table, batch = SampleTable(5, 2), batch_of(3, 5)
    torch.nn.init.normal_(table.free)
    found = table(torch.zeros(3, 1), batch._replace(index=batch.index.to(torch.int32)))
    torch.testing.assert_close(found, table(torch.zeros(3, 1), batch), rtol=0, atol=0)


def test_weight_models_say_which_optimizer_they_want():
    for model in (scalars(), classes(), samples(), sources(), Normalised(sources())):
        adam = default_optimizer(model)
        assert type(adam) is torch.optim.Adam and adam.defaults["lr"] == 0.1 and adam.defaults["weight_decay"] == 0
        assert [p for group in adam.param_groups for p in group["params"]] == list(model.parameters())
    for model in (LossMLP(2, 2), nn.Linear(2, 2), Normalised(LossMLP(2, 2))):
        adam = default_optimizer(model)  # BiKD's
        assert type(adam) is torch.optim.Adam and adam.defaults["lr"] == 1e-3 and adam.defaults["weight_decay"] == 1e-4


def test_the_balancer_asks_for_it():
    student, table = nn.Linear(4, 3), samples()
    options = {"optimizer": torch.optim.SGD(student.parameters(), lr=0.1), "weighting": table}
    assert (
        BilevelLossBalancer(student, [lambda z, batch: z[:, 0]] * 3, **options).weighting_optimizer.defaults["lr"]
        == 0.1
    )
    own = torch.optim.SGD(table.parameters(), lr=1.0)
    balancer = BilevelLossBalancer(student, [lambda z, batch: z[:, 0]] * 3, **options, weighting_optimizer=own)
    assert balancer.weighting_optimizer is own


def test_only_the_rows_of_the_batch_have_a_gradient():
    table = SampleTable(5, 2)
    table(torch.zeros(2, 1), Batch(None, index=torch.tensor([3, 1]))).sum().backward()
    assert (table.free.grad != 0).any(1).tolist() == [False, True, False, True, False]


class TestLazyFeatures:
    def test_an_optimizer_may_be_built_first(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = LossMLP(None, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
        model(torch.rand(3, 5), EMPTY).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert before[0].shape == (64, 5)
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    def test_the_first_batch_leaves_the_random_numbers_alone(self):
        model, features = LossMLP(None, 2), torch.rand(3, 5)
        before = torch.get_rng_state()
        model(features, EMPTY)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_decides_the_weights(self):
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            weights.append(LossMLP(None, 2)(torch.ones(3, 5), EMPTY))
        assert torch.equal(*weights)
        first = torch.nn.utils.parameters_to_vector(LossMLP(None, 2).layers[2].parameters())
        assert first.std() > 0

    def test_a_state_dict_fills_it(self):
        trained, fresh = LossMLP(5, 2), LossMLP(None, 2)
        fresh.load_state_dict(trained.state_dict())
        x = torch.rand(3, 5)
        assert torch.equal(fresh(x, EMPTY), trained(x, EMPTY))

    def test_float64(self):
        assert LossMLP(None, 2).double()(torch.rand(3, 5), EMPTY).dtype == torch.float64


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_rectified_is_rens_rule(rows, terms, seed):
    influence = torch.randn(rows, terms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = Rectified(terms).from_influence(influence)
    helpful = [[max(0.0, -value) for value in row] for row in influence.tolist()]
    total = math.fsum(map(math.fsum, helpful))
    expected = [[rows * value / total if total else 0.0 for value in row] for row in helpful]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    if total:
        assert weights.sum().item() == pytest.approx(rows)


@pytest.mark.parametrize("influence", [torch.zeros(3, 1), torch.ones(3, 1)])
def test_rectified_answers_zeros_where_nothing_helps(influence):
    assert torch.equal(Rectified().from_influence(influence), torch.zeros(3, 1))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_rectified_does_not_depend_on_the_size_of_the_influence(size):
    weights = Rectified().from_influence(torch.tensor([[-size], [-size], [size]]))
    torch.testing.assert_close(weights, torch.tensor([[1.5], [1.5], [0.0]]))


def test_rectified_has_no_graph_and_no_parameters():
    assert list(Rectified().parameters()) == []
    assert not Rectified().from_influence(torch.randn(3, 1, requires_grad=True)).requires_grad


def test_rectified_without_an_influence():
    features = torch.rand(4, 2, dtype=torch.float64)
    assert torch.equal(Rectified(3)(features, EMPTY), torch.ones(4, 3, dtype=torch.float64))
    zeros = Rectified(3).lookahead_weights(features, EMPTY)
    assert torch.equal(zeros, torch.zeros(4, 3, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_rectified_over_a_sample(rows, terms, seed):
    influence = torch.randn(rows, terms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = Rectified(terms, over="sample").from_influence(influence)
    helpful = [[max(0.0, -value) for value in row] for row in influence.tolist()]
    expected = [[value / math.fsum(row) for value in row] if any(row) else [1 / terms] * terms for row in helpful]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_rectified_over_a_sample_has_weights_that_sum_to_one():
    model = Rectified(4, over="sample")
    assert torch.equal(model(torch.rand(3, 2), EMPTY), torch.full((3, 4), 0.25))
    for size in (0.0, 1e-44, 1e30):
        weights = model.from_influence(torch.tensor([[-size, 0.0, -size, size]]))
        expected = [[0.5, 0.0, 0.5, 0.0]] if size else [[0.25] * 4]
        torch.testing.assert_close(weights, torch.tensor(expected))


@given(ROWS, TERMS, st.sampled_from(["sigmoid", "softplus"]), st.integers(0, 99))
def test_normalised_weights_are_shares_of_the_batch_size(rows, terms, output, seed):
    table, batch = SampleTable(7, terms, init=0.5, output=output), batch_of(rows, 7, seed)
    torch.nn.init.normal_(table.free)
    features = torch.zeros(rows, 1)
    plain, found = table(features, batch), Normalised(table)(features, batch)
    torch.testing.assert_close(found, plain * rows / sum(plain.flatten().tolist()))
    assert found.sum().item() == pytest.approx(rows, rel=1e-5)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1e-44, 0.5), (1e30, 0.5)])
def test_normalised_weights_of_any_size(value, expected):
    table = TermScalars(2, output="identity")
    torch.nn.init.constant_(table.free, value)
    torch.testing.assert_close(Normalised(table)(torch.zeros(3, 1), EMPTY), torch.full((3, 2), expected))


def test_derivatives_go_through_the_normalisation():
    model = Normalised(LossMLP(2, 1, (4,))).double()
    names = [name for name, _ in model.named_parameters()]
    features = torch.rand(4, 2, dtype=torch.float64)

    def weights(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (features, EMPTY))

    parameters = [p.detach().normal_().requires_grad_() for p in model.parameters()]
    assert gradcheck(weights, parameters, check_forward_ad=True) and gradgradcheck(weights, parameters)


def test_the_mlp_takes_other_activations():
    model = LossMLP(2, 1, (3,), activation=nn.ReLU).double()
    w, b, v, c = model.parameters()
    x = torch.randn(5, 2, dtype=torch.float64)
    expected = 1 / (1 + (-((x @ w.T + b).clamp(min=0) @ v.T + c)).exp())
    torch.testing.assert_close(model(x, EMPTY), expected, rtol=1e-12, atol=0)


@given(ROWS, st.integers(2, 5), st.integers(0, 999))
def test_the_gate_compares_entropies(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)).unbind()
    found = entropies(torch.zeros(rows, 3), student, Batch(None, teacher=teacher))
    for z, column in ((student, found[:, 0]), (teacher, found[:, 1])):
        p = z.exp() / z.exp().sum(1, keepdim=True)
        torch.testing.assert_close(column, -(p * p.log()).sum(1), rtol=1e-9, atol=1e-12)
    expected = [[1.0, 0.5, 3.0] if s > t else [1.0, 3.0, 0.5] for s, t in found.tolist()]
    assert EntropyGate(0.5, 3.0)(found, EMPTY).tolist() == expected


def test_the_gate_at_certainty_and_at_a_tie():
    sure = torch.tensor([[float("-inf"), 0.0]])
    found = entropies(torch.zeros(1, 3), sure, Batch(None, teacher=sure))
    assert found.tolist() == [[0.0, 0.0]]
    assert EntropyGate()(found, EMPTY).tolist() == [[1.0, 2.0, 1.0]]


@given(ROWS, st.integers(2, 5), st.integers(0, 10**6))
def test_class_aware_features_are_losses_entropies_and_rarity(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)).unbind()
    targets = torch.randint(classes, (rows,), generator=generator)
    counts = torch.randint(1, 1000, (classes,), generator=generator).tolist()
    batch = Batch(None, targets, teacher=teacher)
    found = ClassAware(counts)(torch.zeros(rows, 2), student, batch)
    expected = []
    for i, label in enumerate(targets.tolist()):
        p, q = ((z[i] - z[i].logsumexp(0)).exp() for z in (teacher, student))
        losses = [-q[label].log(), -p[label].log(), -(q * q.log()).sum(), -(p * p.log()).sum()]
        expected.append([*map(float, losses), math.log(max(counts) / counts[label])])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    alone = ClassAware(counts)(torch.zeros(rows, 2), student, batch._replace(teacher=None))
    torch.testing.assert_close(alone, found[:, [0, 2, 4]], rtol=0, atol=0)
    narrow = ClassAware(counts)(torch.zeros(rows, 2), student, batch._replace(targets=targets.to(torch.uint8)))
    torch.testing.assert_close(narrow, found, rtol=0, atol=0)  # a byte is a label, not a mask


def test_a_recipe_without_a_teacher_with_class_aware_features():
    student = nn.Linear(4, 3)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = recipes.meta_weight_net(student, optimizer=sgd, features=ClassAware([40, 9, 2]))
    batch, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    balancer(batch, meta).backward()
    assert next(balancer.weighting.parameters()).shape == (100, 3)


def test_a_recipe_with_class_aware_features():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = recipes.bikd(student, teacher, optimizer=sgd, features=ClassAware(torch.tensor([40, 9, 2])))
    batch, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    balancer(batch, meta).backward()
    assert next(balancer.weighting.parameters()).shape == (64, 5)
    copied = pickle.loads(pickle.dumps(deepcopy(balancer.features)))
    seen = [
        each(torch.zeros(6, 2), student(batch[0]), Batch(*batch, teacher(batch[0])))
        for each in (balancer.features, copied)
    ]
    assert copied.counts == (40, 9, 2) and torch.equal(*seen)
