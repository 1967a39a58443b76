"""What the balancer does, call by call; closed forms."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms, weighting
from tests.tally import Tally
from tests.test_no_trace import assert_same

TERMS = {
    "hard": terms.CrossEntropy(),
    "smooth": terms.CrossEntropy(label_smoothing=0.3),
    "adjusted": terms.LogitAdjusted([5, 3, 2]),
    "margin": lambda outputs, batch: outputs.square().sum(1),
    "entropy": lambda outputs, batch: -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1),
}


def data(size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def build(student=None, names=("hard", "smooth"), lr=0.3, **options):
    student = network() if student is None else student
    if "weighting" not in options and "features" not in options:
        options["weighting"] = weighting.LossMLP(len(names), len(names), hidden=(3,)).double()
    options.setdefault("optimizer", torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=lr))
    return BilevelLossBalancer(student, {name: TERMS[name] for name in names}, **options)


def phi_gradient(balancer):
    return torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True, maximize=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}


@given(
    size=st.integers(1, 6),
    meta_size=st.integers(1, 4),
    names=st.lists(st.sampled_from(sorted(TERMS)), min_size=1, max_size=5, unique=True),
    rule=st.sampled_from(sorted(OPTIMIZERS)),
    inner=st.sampled_from(["sgd", "mirror"]),
    frozen=st.sampled_from([None, "0.weight", "2.bias"]),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20)
def test_exact_estimators_agree(size, meta_size, names, rule, inner, frozen, warm, seed):
    batch, meta_batch = data(size, seed=seed), data(meta_size, seed=seed + 1)
    found = []
    for estimator in (estimators.OneStep("forward"), estimators.OneStep("reverse"), estimators.Unroll()):
        torch.manual_seed(seed)
        student = network()
        if frozen is not None:
            student.get_parameter(frozen).requires_grad_(False)
        optimizer = OPTIMIZERS[rule]([p for p in student.parameters() if p.requires_grad])
        if warm:
            F.cross_entropy(student(batch[0]), batch[1]).backward()
            optimizer.step()
        balancer = build(student, names, optimizer=optimizer, inner=inner, estimator=estimator)
        balancer(batch, meta_batch)
        found.append((phi_gradient(balancer), balancer.report.influence))
    (gradient, influence), *others = found
    for other_gradient, other_influence in others:
        assert (other_gradient - gradient).norm() <= 1e-10 * gradient.norm()
        assert (other_influence - influence).norm() <= 1e-10 * influence.norm()
    if (size + meta_size + seed) % 3 == 0:  # finite differences take their time
        check_hypergradient(build(student, names, optimizer=optimizer, inner=inner), [batch], meta_batch, directions=1)


def test_meta_step_ends_where_real_steps_end():
    """K virtual steps with fixed weights are K real steps of the user's loop, batch statistics included."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    balancer = build(student, optimizer=optimizer, inner="mirror", estimator=estimators.Unroll())
    batches, meta_batch = [data(6, seed=t) for t in range(3)], data(5, seed=9)
    torch.manual_seed(4)
    frozen = copy.deepcopy(balancer.weighting.state_dict())
    meta_loss = balancer.meta_step(batches, meta_batch).meta_loss
    balancer.weighting.load_state_dict(frozen)
    torch.manual_seed(4)
    for batch in batches:
        loss = balancer.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = F.cross_entropy(student(meta_batch[0]), meta_batch[1])
    torch.testing.assert_close(meta_loss, expected.detach(), rtol=1e-12, atol=1e-12)


def test_report_after_every_kind_of_step():
    balancer = build(every=2, estimator=estimators.Unroll())
    batch, meta_batch = data(5), data(4, seed=1)
    balancer(batch, meta_batch)
    report = balancer.report
    assert report.losses.shape == report.weights.shape == (5, 2)
    assert report.influence is report.meta_loss is report.hypergradient_norm is None
    balancer(batch, meta_batch)
    report = balancer.report
    assert report.influence.shape == (5, 2)
    torch.testing.assert_close(report.hypergradient_norm, phi_gradient(balancer).norm())
    assert report.meta_loss.shape == ()
    assert balancer.meta_step([batch] * 2, meta_batch) is balancer.report
    assert balancer.report.influence is None and balancer.report.hypergradient_norm > 0


def test_influence_is_the_effect_of_a_weight_on_the_meta_loss():
    """(1/B) influence_ik = d meta_loss(theta - lr grad) / d w_ik, by finite differences on a plain loop."""
    torch.manual_seed(0)
    student = network()
    (x, y), (meta_x, meta_y) = data(4), data(3, seed=1)
    balancer = build(student)
    weights = balancer.weights((x, y))

    def meta_loss(weights):
        twin = copy.deepcopy(student)
        losses = torch.stack([TERMS[n](twin(x), Batch(x, y)) for n in ("hard", "smooth")], dim=1)
        ((weights * losses).sum() / 4).backward()
        torch.optim.SGD(twin.parameters(), lr=0.3).step()
        return F.cross_entropy(twin(meta_x), meta_y).item()

    balancer((x, y), (meta_x, meta_y))
    step = torch.zeros_like(weights)
    step[2, 1] = 1e-4
    slope = (meta_loss(weights + step) - meta_loss(weights - step)) / 2e-4
    assert balancer.report.influence[2, 1].item() / 4 == pytest.approx(slope, rel=1e-6)


def test_accumulate_averages_before_each_step():
    torch.manual_seed(0)
    model = weighting.LossMLP(2, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    balancer = build(weighting=model, weighting_optimizer=optimizer, accumulate=3)
    batch, metas = data(5), [data(4, seed=t) for t in range(3)]
    start, gathered = copy.deepcopy(model.state_dict()), []
    for t, meta_batch in enumerate(metas):
        balancer(batch, meta_batch)
        gathered.append(phi_gradient(balancer))
        moved = any(not torch.equal(p, start[n]) for n, p in model.state_dict().items())
        assert moved == (t == 2)
    expected = torch.cat([p.flatten() for p in start.values()]) - torch.stack(gathered).mean(0)
    torch.testing.assert_close(torch.cat([p.flatten() for p in model.state_dict().values()]), expected)
    assert not torch.equal(gathered[0], gathered[2])


def test_every_takes_the_nth_calls():
    balancer = build(every=3)
    taken = []
    for _ in range(7):
        balancer(data(5), data(4))
        taken.append(balancer.report.meta_loss is not None)
    assert taken == [False, False, True, False, False, True, False]


def test_one_step_shares_the_train_forward_and_hands_the_gradient_on():
    student, passes = network(), Tally()
    hook = student.register_forward_hook(lambda module, args, out: passes(out.requires_grad))
    build(student, accumulate=2, verify=False)(data(5), data(4))
    # The training forward, the meta forward, the forward-mode pass, which has no graph in the student.
    assert passes.seen == [True, True, False]
    hook.remove()
    balancer = build(student, accumulate=2, verify=False)
    handed = [type(balancer(data(5), data(4)).grad_fn).__name__ == "_HandOverBackward" for _ in range(4)]
    assert handed == [True, False, True, False]  # where the weight model moves, the real gradient is another one


def test_hooks_on_activations_see_the_users_backward_pass():
    """So no gradient is handed over past them."""
    student, seen = network(), Tally()
    student[2].register_full_backward_hook(lambda module, inputs, outputs: seen(1))
    loss = build(student, accumulate=2, verify=False)(data(5), data(4))
    before = len(seen.seen)
    loss.backward()
    assert len(seen.seen) == before + 1


def test_one_step_builds_no_second_order_graph(monkeypatch):
    grad, asked = torch.autograd.grad, []

    def spy(outputs, inputs, *args, **kwargs):
        asked.append(kwargs.get("create_graph", False))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    build()(data(5), data(4))
    assert len(asked) > 2 and not any(asked)


def test_one_forward_mode_pass_serves_all_terms():
    for names in (["hard"], sorted(TERMS)):
        student, passes = network(), Tally()
        student.register_forward_hook(lambda module, args, out, passes=passes: passes(1))
        build(student, names, verify=False)(data(5), data(4))
        assert len(passes.seen) == 3


def test_torchopt_transformation_as_inner():
    torch.manual_seed(0)
    student = network()
    chain = torchopt.combine.chain(torchopt.clip.clip_grad_norm(0.05), torchopt.adam(lr=0.01))
    balancer = build(student, inner=chain)
    check_hypergradient(balancer, [data(5)], data(4, seed=1))
    student_sgd = build(student, inner=torchopt.sgd(lr=0.3))
    mine = build(student, inner="sgd")
    mine.weighting.load_state_dict(student_sgd.weighting.state_dict())
    student_sgd(data(5), data(4)), mine(data(5), data(4))
    torch.testing.assert_close(student_sgd.report.influence, mine.report.influence, rtol=1e-12, atol=0)


def test_teacher_runs_once_a_batch_and_not_for_a_meta_loss_without_it():
    calls = []
    teacher = network()
    teacher.register_forward_hook(lambda *a: calls.append(1))
    student = network()
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "soft": terms.SoftTarget()},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        teacher=teacher,
    )
    balancer(data(5), data(4))
    assert len(calls) == 1
    balancer.meta_loss = terms.SoftTarget()
    balancer(data(5), data(4))
    assert len(calls) == 3
    x, y = data(5)
    balancer(Batch(x, y, teacher=torch.zeros(5, 3).double()), data(4))
    assert len(calls) == 4
    losses = balancer.report.losses[:, 0]
    torch.testing.assert_close(losses, F.cross_entropy(student(x), y, reduction="none").detach())


def test_default_features_are_bikds():
    seen = []

    class Watch(weighting.LossMLP):
        def forward(self, features, batch):
            seen.append(features)
            return super().forward(features, batch)

    student, teacher = network(), network()
    balancer = BilevelLossBalancer(
        student,
        [terms.CrossEntropy(), terms.SoftTarget(), terms.ReverseSoftTarget()],
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        teacher=teacher,
        weighting=Watch(2, 3).double(),
    )
    x, y = data(5)
    expected = torch.stack([F.cross_entropy(net(x), y, reduction="none") for net in (student, teacher)], 1)
    balancer((x, y), data(4))
    torch.testing.assert_close(seen[0], expected.detach())
    assert not seen[0].requires_grad
    assert balancer.report.weights.shape == (5, 3)


def test_own_features_need_no_width():
    balancer = build(features=lambda losses, outputs, batch: torch.cat([losses, outputs], 1))
    fresh = copy.deepcopy(balancer.state_dict())
    assert fresh["weighting"] == {}
    balancer(data(5), data(4))
    assert balancer.weighting.layers[0].in_features == 5
    other = build(features=lambda losses, outputs, batch: torch.cat([losses, outputs], 1))
    other.load_state_dict(balancer.state_dict())
    assert_same(other.state_dict(), balancer.state_dict())
    other = build(features=lambda losses, outputs, batch: outputs, estimator=estimators.Unroll())
    other.meta_step([data(5)] * 2, data(4))


# Closed forms ----------------------------------------------------------------------------------------------------


def test_linear_model_with_one_quadratic_term():
    """x_i = 1: theta' = theta - lr mean_i w_i (theta - y_i); d meta / d w_i = -(lr / B)(theta - y_i)(theta' - m)."""
    student = nn.Linear(1, 1, bias=False).double()
    theta, lr, y, m = 0.7, 0.25, torch.tensor([0.2, -1.0, 2.0]).double(), 0.4
    student.weight.data.fill_(theta)
    quadratic = lambda outputs, batch: (outputs[:, 0] - batch.targets) ** 2 / 2  # noqa: E731
    table = weighting.SampleTable(3, 1, init=0.5, output="identity").double()
    balancer = BilevelLossBalancer(
        student,
        [quadratic],
        optimizer=torch.optim.SGD(student.parameters(), lr=lr),
        weighting=table,
        weighting_optimizer=torch.optim.SGD(table.parameters(), lr=2.0),
        meta_loss=quadratic,
    )
    ones = torch.ones(3, 1).double()
    loss = balancer((ones, y, torch.arange(3)), (ones[:1], torch.tensor([m], dtype=torch.float64)))
    ahead = theta - lr * (0.5 * (theta - y)).mean()
    expected = -(lr / 3) * (theta - y) * (ahead - m)
    torch.testing.assert_close(balancer.report.influence[:, 0] / 3, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(balancer.report.weights[:, 0], 0.5 - 2.0 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, ((0.5 - 2.0 * expected) * (theta - y) ** 2 / 2).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(balancer.report.meta_loss, (ahead - m) ** 2 / 2, rtol=1e-12, atol=0)


def test_a_model_without_parameters_is_never_stepped():
    batch = data(6)
    balancer = build(names=["hard"], weighting=weighting.Rectified())
    assert balancer.weighting_optimizer is None
    torch.testing.assert_close(balancer.loss(batch), F.cross_entropy(balancer.student(batch[0]), batch[1]))
    with pytest.raises(MetaKDError, match="no trainable parameters"):
        balancer.meta_step([batch], data(4, seed=1))


# It learns -------------------------------------------------------------------------------------------------------


def learned_by(table, student, batch, meta_batch, **options):
    """The weights (B,) of the one term after 40 steps on one batch."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    balancer = BilevelLossBalancer(
        student,
        [terms.CrossEntropy()],
        optimizer=optimizer,
        weighting=table,
        weighting_optimizer=torch.optim.Adam(table.parameters(), lr=0.1),
        **options,
    )
    for _ in range(40):
        loss = balancer(batch, meta_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return balancer.report.weights[:, 0]


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Unroll()], ids=str)
def test_wrong_labels_lose_their_weight(estimator):
    """Half of the training labels are wrong; a table of weights finds out which."""
    torch.manual_seed(0)
    x = torch.randn(60, 4).double()
    truth = (x @ torch.randn(4, 3).double()).argmax(1)
    y = truth.clone()
    y[:30] = (y[:30] + 1) % 3
    student, table = nn.Linear(4, 3).double(), weighting.SampleTable(60, 1, init=0.5, output="sigmoid").double()
    meta = torch.randn(60, 4).double()
    meta_batch = (meta, student_truth(x, truth, meta))
    weights = learned_by(table, student, (x, y, torch.arange(60)), meta_batch, estimator=estimator)
    assert weights[:30].mean() < 0.35 < 0.65 < weights[30:].mean()


@pytest.mark.parametrize("counts", [(27, 3), (15, 15)])
def test_a_balanced_meta_set_makes_the_rare_class_count(counts):
    """Nine of ten training samples are of class 0; a meta set like them asks for nothing else."""

    def samples(counts):
        y = torch.arange(2).repeat_interleave(torch.tensor(counts))
        return torch.randn(len(y), 2).double() + F.one_hot(y, 2), y

    torch.manual_seed(0)
    train, meta_batch, student = samples((54, 6)), samples(counts), nn.Linear(2, 2).double()
    weights = learned_by(weighting.ClassTable(2, 1, init=0.5, output="sigmoid").double(), student, train, meta_batch)
    common, rare = (weights[train[1] == c].mean().item() for c in (0, 1))
    assert (rare > 2 * common) == (counts == (15, 15))


def student_truth(x, truth, meta):
    """Labels of the meta inputs by a classifier fitted to the true labels."""
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), truth)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model(meta).argmax(1)


def test_a_state_is_a_copy():
    balancer = build()
    state = balancer.state_dict()
    saved = copy.deepcopy(state)
    balancer(data(5), data(4))
    assert_same(state, saved)
