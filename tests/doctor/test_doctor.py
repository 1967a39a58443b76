"""A diagnosis measures what it says, says what is the matter, and leaves no trace."""

import copy
import re
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, diagnose, estimators, terms, weighting
from metakd.monitor.doctor.numbers import _signal
from tests.slow import slow_but
from tests.test_no_trace import assert_same, set_up, trace_of
from tests.zoo import QUIET, ZOO

pytestmark = QUIET
PAIR = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}


def batches(number=6, size=16, noise=0.0, flipped=False):
    """Samples of three classes, told apart by their first three numbers unless there is only noise."""
    found = []
    for _ in range(number):
        targets = torch.randint(3, (size,))
        inputs = torch.randn(size, 4)
        inputs[:, :3] += (1 - noise) * 2 * F.one_hot(targets, 3)
        found.append((inputs, (targets + 1) % 3 if flipped else targets))
    return found


def build(model=None, *, lr=0.1, step=None, pair=PAIR, **options):
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    step = None if model is None else (step or torch.optim.Adam)(model.parameters())
    return BilevelLossBalancer(student, pair, optimizer=optimizer, weighting=model, weighting_optimizer=step, **options)


class Wrapped(nn.Module):
    """A function of the features as a weight model, with one parameter."""

    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(()))

    def forward(self, features, batch):
        return self.function(features, self.scale)


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")
@pytest.mark.parametrize("name", slow_but(("mlp", "dropout", "batch_norm", "moving_centre"), ZOO))
def test_it_leaves_no_trace(name):
    student, optimizer, balancer, batch, meta_batch = set_up(name, accumulate=2)
    balancer.loss(batch)
    balancer.meta_step([batch], meta_batch)  # half of a step is pending, and there is a report
    report = balancer.report
    loaders = [torch.utils.data.TensorDataset(*part[:2]) for part in (batch, meta_batch)]
    loaders = [torch.utils.data.DataLoader(part, batch_size=2, shuffle=True, drop_last=True) for part in loaders]
    before, own = trace_of(student, optimizer, balancer.weighting), balancer.state_dict()
    grads = [p.grad.clone() for p in balancer.weighting.parameters()]
    diagnosis = diagnose(balancer, chain([batch, meta_batch], loaders[0]), loaders[1], number=3)
    assert diagnosis.numbers.batches == 3
    assert_same(trace_of(student, optimizer, balancer.weighting), before)
    assert_same(balancer.state_dict(), own)
    assert balancer.report is report
    assert_same([p.grad for p in balancer.weighting.parameters()], grads)


def test_the_next_step_is_the_same_with_and_without_a_diagnosis():
    found = []
    for asks in (False, True):
        torch.manual_seed(0)
        balancer, data = build(), batches()
        balancer(data[0], data[1])
        if asks:
            diagnose(balancer, data, data)
        balancer(data[2], data[3])
        found.append([balancer.state_dict(), balancer.report.influence, torch.rand(2)])
    assert_same(*found)


def test_an_error_on_the_way_leaves_no_trace():
    balancer, data = build(), batches()
    before, own = trace_of(balancer.student, balancer.optimizer), balancer.state_dict()
    bad = (torch.full((16, 4), torch.nan), data[0][1])
    with pytest.raises(MetaKDError, match="not finite"):
        diagnose(balancer, [data[0], bad], data)
    assert_same(trace_of(balancer.student, balancer.optimizer), before)
    assert_same(balancer.state_dict(), own)


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint()], ids=str)
def test_the_numbers_are_those_of_calls(estimator):
    balancer, data = build(estimator=estimator, accumulate=4), batches(4)
    meta = batches(4)
    numbers = diagnose(balancer, data, meta).numbers
    twin = copy.deepcopy(balancer)
    norms, gradients, weights, cosines, before, after = [], [], [], [], [], []
    for batch, meta_batch in zip(data, meta, strict=True):
        weights.append(balancer.weights(batch))
        plain = F.cross_entropy(balancer.student(meta_batch[0]), meta_batch[1])
        params = list(balancer.student.parameters())
        v = torch.cat([g.flatten() for g in torch.autograd.grad(plain, params)])
        loss = twin(batch, meta_batch)
        if len(norms) < 3:  # the fourth moves the weights before it weighs
            g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.student.parameters()))])
            cosines.append(F.cosine_similarity(g, v, dim=0).item())
        before.append(plain.item())
        after.append(twin.report.meta_loss.item())
        norms.append(twin.report.hypergradient_norm.item())
        gradients.append({name: p.grad.clone() for name, p in twin.weighting.named_parameters()})
    assert numbers.batches == 4
    assert numbers.hypergradient_norm == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert numbers.before == pytest.approx(sum(before) / 4, rel=1e-5)
    changes = torch.tensor(after).double() / torch.tensor(before).double() - 1
    assert numbers.change.value == pytest.approx(changes.mean().item(), rel=1e-3)
    assert numbers.change.error == pytest.approx(changes.std().item() / 2, rel=1e-3)
    of_all = torch.cat(weights)
    assert numbers.mean == pytest.approx(of_all.mean(0).tolist(), rel=1e-5)
    assert numbers.spread == pytest.approx(of_all.std(0).tolist(), rel=1e-4)
    visits = diagnose(balancer, data[:3], meta[:3]).numbers
    assert visits.cosine.value == pytest.approx(sum(cosines) / 3, rel=1e-4)
    # The four calls stepped the twin's weight model along the mean of their hypergradients.
    moved = torch.cat([twin.weights(batch) - w for batch, w in zip(data, weights, strict=True)]).abs().mean().item()
    assert numbers.weights_step == pytest.approx(moved, rel=1e-4)
    pairs = list(zip(twin.weighting.parameters(), balancer.weighting.parameters(), strict=True))
    length = sum((p - q).square().sum() for p, q in pairs).sqrt() / sum(q.square().sum() for _, q in pairs).sqrt()
    assert numbers.step == pytest.approx(length.item(), rel=1e-4)


def test_signal_over_noise_of_planted_ones():
    true, n = torch.randn(500).double(), 8
    true *= 3 / true.norm()
    rows = [{"w": true + torch.randn(500).double() * (6 / 500**0.5)} for _ in range(n)]  # noise of norm 6
    signal, needed = _signal(rows)
    assert signal == pytest.approx((1 + 9 / (36 / n)) ** 0.5, rel=0.1)
    assert needed == pytest.approx(36 / 9, rel=0.25)
    alone, _ = _signal([{"w": torch.randn(500).double()} for _ in range(40)])
    assert alone == pytest.approx(1, abs=0.15)
    assert _signal([{"w": row} for row in torch.eye(5)]) == (None, None)  # a table's rows, each met once


def test_how_far_the_weights_have_moved_since():
    balancer, data = build(), batches()
    first = diagnose(balancer, data, data)
    assert first.numbers.moved is None and diagnose(balancer, data, data, previous=first).numbers.moved == 0
    old = torch.cat([balancer.weights(batch) for batch in data])
    with torch.no_grad():
        for p in balancer.weighting.parameters():
            p.add_(0.1)
    moved = (torch.cat([balancer.weights(batch) for batch in data]) - old).abs().mean().item()
    again = diagnose(balancer, data, data, previous=first)
    assert again.numbers.moved == pytest.approx(moved, rel=1e-4) and moved > 0.01
    assert f"a sample's weight has changed by {moved:.2g}" in str(again)


def test_a_healthy_balancer_is_told_so():
    mlp = weighting.LossMLP(2, 2)
    balancer, data, meta = build(mlp), batches(8), batches(8, size=64)
    with torch.no_grad():
        mlp.layers[-1].weight.mul_(3)
    diagnosis = diagnose(balancer, data, meta)
    assert diagnosis.learning.startswith("Yes: the hypergradients have a direction in common")
    assert diagnosis.learned.startswith("Weights of their own for each sample and term (on average hard ")
    assert not diagnosis.findings
    lines = str(diagnosis).splitlines()
    assert lines[0] == f"Is it learning? {diagnosis.learning}."
    assert lines[1] == f"What has it learned? {diagnosis.learned}."
    assert [line[:28].strip() for line in lines[3:]] == [
        "hypergradient", "train and meta gradient", "the student's step ahead",
        "weight of hard", "weight of smooth", "the weight model's step",
    ]  # fmt: skip


def saturated():
    mlp = weighting.LossMLP(2, 2)
    nn.init.constant_(mlp.layers[-1].bias, 6.0)
    return build(mlp)


def constant():
    mlp = weighting.LossMLP(2, 2)
    nn.init.zeros_(mlp.layers[-1].weight)
    return build(mlp)


def adam(lr):
    return lambda params: torch.optim.Adam(params, lr=lr)


def unbiased(**options):
    """A student that prefers no class."""
    balancer = build(**options)
    with torch.no_grad():
        for p in balancer.student.parameters():
            p.zero_()
    return balancer


def one_weight():
    return build(Wrapped(lambda x, s: torch.sigmoid(s * x[:, :1]).expand(-1, 2)))


def moved(model, to):
    """A table or scalars whose free numbers are all at one place."""
    nn.init.constant_(model.free, to)
    return model


def shrunk_network():
    mlp = weighting.LossMLP(2, 2)
    nn.init.constant_(mlp.layers[-1].bias, -3.0)
    return build(mlp)


CASES = {
    "no hypergradient": (lambda: build(lr=0.0), {}, "error", "the hypergradient: it cannot be taken. .*learning rate"),
    "constant": (constant, {}, "warning", "the weights: they are the same for all samples"),
    "saturated": (saturated, {}, "warning", "smooth: for 100 % of the samples it is within 0.02 of the upper"),
    "frozen": (lambda: build(weighting.LossMLP(2, 2), step=adam(1e-9)), {}, "warning", r"0.01 takes [\d,]{7,} steps"),
    "not moving": (lambda: build(weighting.LossMLP(2, 2), step=adam(0.0)), {}, "warning", "does not change the w"),
    "jumps": (lambda: build(weighting.LossMLP(2, 2), step=adam(3.0)), {}, "warning", "they jump rather than learn"),
    "slow": (lambda: build(moved(weighting.TermScalars(2), 0.0), step=adam(1e-4)), {}, "warning",
             r"hardly moves: a step changes a weight by 5e-05, so 0.1 takes [12],\d\d\d steps.*Raise its "
             r"learning rate, now 0.0001, to about 0.02"),
    "shrunk": (lambda: build(moved(weighting.TermScalars(2), -3.0)), {}, "warning",
               r"to 0.095 times their start.*step shorter.*two controls.*from 0.095 times"),
    "a shrunk network": (shrunk_network, {}, "warning", "times their start.*step shorter"),
    "run away": (lambda: build(moved(weighting.TermScalars(2, output="softplus"), 18.0)), {}, "warning",
                 r"to 18 times their start.*step longer.*Nothing bounds them: output='bounded'"),
    "tiny step ahead": (lambda: build(lr=1e-8), {}, "warning", "next to nothing to learn from"),
    "long step ahead": (lambda: build(lr=100.0), {}, "warning", "raises the meta loss.* it is too long"),
    "against": (unbiased, {"flipped": True}, "warning", "points away from the meta gradient"),
    "small weights": (lambda: build(weighting.ClassTable(3, 2, init=0.01)), {}, "warning", "as if at 0.02 times its"),
    "large weights": (lambda: build(weighting.ClassTable(3, 2, init=9.0)), {}, "warning", "is 18 on average"),
    "noise": (unbiased, {"noise": 1.0, "size": 2}, "note", "noise alone gives 1"),
    "together": (one_weight, {}, "note", "same proportions in every sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_the_matter_is_said(name):
    make, of_meta, level, message = CASES[name]
    balancer = make()
    data = batches(8, noise=of_meta.get("noise", 0.0))
    found = diagnose(balancer, data, batches(8, **of_meta))
    matching = [finding for finding in found.findings if finding.level == level]
    assert any(re.search(message, str(finding)) for finding in matching), str(found)


def test_a_negative_result_is_plain():
    found = diagnose(constant(), batches(), batches())
    assert found.learned.startswith("A constant mixture, the same for every sample: hard ")
    text = " ".join(str(found).split())
    assert "a plain loss with these numbers as fixed weights would train the same student" in text
    assert diagnose(build(lr=0.0), batches(), batches()).learning == "No: there is no hypergradient"
    frozen = build(weighting.LossMLP(2, 2), step=adam(0.0))
    assert diagnose(frozen, batches(), batches()).learning == "No: its steps do not move the weights"
    still = diagnose(unbiased(), batches(8, noise=1.0), batches(8, noise=1.0, size=2))
    assert still.learning.startswith("Not now: the hypergradients have no direction in common")
    table = build(weighting.SampleTable(96, 2))
    rows = [(x, y, torch.arange(16 * i, 16 * i + 16)) for i, (x, y) in enumerate(batches())]
    assert diagnose(table, rows, batches()).learning.startswith("Perhaps: ")
    assert diagnose(one_weight(), batches(), batches()).learned.startswith("How much a sample counts")


def test_weights_that_sort_samples_have_not_only_changed_the_step():
    table = weighting.ClassTable(3, 2)
    for third in (-9.0, 9.0):  # the mean may fall to a third; the samples differ by as much
        with torch.no_grad():
            table.free.copy_(torch.tensor([[-9.0], [-9.0], [third]]).expand(3, 2))
        numbers = diagnose(build(table), batches(), batches()).numbers
        assert numbers.scale == pytest.approx(sum(numbers.mean) / 2) and numbers.scaled == (third < 0)
    bounded = diagnose(build(weighting.TermScalars(2)), batches(), batches()).numbers
    assert bounded.scale == pytest.approx(1) and bounded.scale_spread < 1e-6 and bounded.rate == 1e-3
    assert diagnose(build(weighting.TermScalars(2, output="softmax")), batches(), batches()).numbers.scale is None
    assert diagnose(one_weight(), batches(), batches()).numbers.scale is None


def test_the_ends_of_a_bounded_table_are_nought_and_twice_its_start():
    table = weighting.ClassTable(3, 2, init=4.0)
    with torch.no_grad():
        table.free.copy_(torch.tensor([[-9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]))
    numbers = diagnose(build(table), batches(), batches()).numbers
    assert numbers.at_low[0] + numbers.at_high[0] == pytest.approx(1) and 0 < numbers.at_low[0] < numbers.at_high[0]
    assert numbers.at_low[1] == numbers.at_high[1] == 0


def test_one_weight_a_term_is_no_failure_of_a_model_that_has_no_more():
    found = diagnose(build(weighting.TermScalars(2)), batches(), batches())
    assert found.learned == "A constant mixture, the same for every sample: hard 1, smooth 1"
    assert not any("same for all samples" in str(finding) for finding in found.findings)


def test_the_training_gradient_may_be_the_meta_gradient_already():
    balancer, data = build(pair={"hard": terms.CrossEntropy()}), batches()
    found = diagnose(balancer, data, data)
    assert found.numbers.cosine.value > 0.95
    assert any("it is the meta gradient already" in str(finding) for finding in found.findings)


@pytest.mark.parametrize(
    ("make", "number", "message"),
    [
        (lambda: build(weighting.LossMLP(2, 2)), 1, "two batches to tell signal from noise, got 1"),
        (lambda: build(weighting.LossMLP(2, 2)), 0, "got 0"),
        (lambda: build(weighting.LossMLP(None, 2)), 4, "has not seen a batch yet"),
        (
            lambda: BilevelLossBalancer(
                (s := nn.Linear(4, 3)), PAIR, optimizer=torch.optim.SGD(s.parameters(), lr=0.1),
                weighting=weighting.Rectified(2),
            ),
            4,
            "Rectified has no trainable parameters",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_diagnosed_is_named(make, number, message):
    with pytest.raises(MetaKDError, match=message):
        diagnose(make(), batches(4), batches(4), number=number)
