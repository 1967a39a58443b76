"""Checks on numbers: one host sync for all of a call, none if they are deferred; errors stay as clear as before."""

import math

import pytest
import torch
from torch import nn

from benchmarks.common.counts import count
from metakd import Batch, BilevelLossBalancer, MetaKDError
from metakd._basics.checks import check, check_finite, checked_before, implied, once, read_at_end
from metakd.estimators import Adjoint
from metakd.terms import CrossEntropy, SoftTarget
from metakd.weighting import LossMLP, Normalised


def parts(**options):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, foreach=True)
    terms = {"hard": CrossEntropy(), "soft": SoftTarget()}
    return student, optimizer, BilevelLossBalancer(
        student, terms, optimizer=optimizer, teacher=nn.Linear(4, 3), **options
    )  # fmt: skip


def batch(seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randint(classes, (6,), generator=generator)


def iteration(balancer, optimizer, train, meta):
    loss = balancer(train, meta)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("deferred", "waits"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("options", [{}, {"order": "simultaneous"}, {"accumulate": 2}, {"inner": "mirror"}], ids=str)
def test_an_iteration_waits_once_or_never(deferred, waits, options):
    _, optimizer, balancer = parts(defer_checks=deferred, **options)
    iteration(balancer, optimizer, batch(0), batch(1))  # proves
    iteration(balancer, optimizer, batch(2), batch(3))
    balancer.read_checks()
    assert sum(count(lambda: iteration(balancer, optimizer, batch(4), batch(5))).syncs.values()) == waits


def faults():
    nan = batch(4)
    nan[0][2, 1] = math.nan
    wrong = batch(4)
    wrong[1][3] = 2**20
    return {"NaN": (nan, batch(5), "its inputs hold such values in samples .2."),
            "meta NaN": (batch(5), nan, "its inputs hold such values|the outer loss is nan"),
            "label": (wrong, batch(5), "label 1048576 is out of range .0, 3.")}  # fmt: skip


@pytest.mark.parametrize("fault", ["NaN", "meta NaN", "label"])
def test_a_fault_is_named_and_the_call_undone(fault):
    train, meta, words = faults()[fault]
    student, optimizer, balancer = parts()
    iteration(balancer, optimizer, batch(0), batch(1))
    before = [t.clone() for t in (*student.state_dict().values(), *balancer.weighting.state_dict().values())]
    state = {name: value.clone() for name, value in balancer.weighting_optimizer.state_dict()["state"][0].items()}
    with pytest.raises(MetaKDError, match=words):
        balancer(train, meta)
    after = [*student.state_dict().values(), *balancer.weighting.state_dict().values()]
    assert all(map(torch.equal, after, before))
    now = balancer.weighting_optimizer.state_dict()["state"][0]
    assert all(torch.equal(now[name], value) for name, value in state.items())


def test_a_deferred_fault_is_reported_by_the_next_call_once():
    _, optimizer, balancer = parts(defer_checks=True)
    iteration(balancer, optimizer, batch(0), batch(1))
    balancer(faults()["NaN"][0], batch(1))
    with pytest.raises(MetaKDError, match=r"a check of the last call: term 'hard' is nan for sample"):
        balancer(batch(2), batch(3))
    balancer.read_checks()


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "simultaneous"}, {"accumulate": 2}, {"every": 2}, {"inner": "mirror"}, {"estimator": Adjoint()}],
    ids=str,
)
def test_no_graph_outlives_an_iteration(deferred, options):
    """A waiting check must not hold the activations of the training pass until the next call."""
    student, optimizer, balancer = parts(defer_checks=deferred, **options)
    for number in range(4):
        iteration(balancer, optimizer, batch(number), batch(number + 1))
        assert not [name for name, p in student.named_parameters() if _has_a_graph(p)]
    balancer.meta_step([batch(0)], batch(1))
    assert not [name for name, p in student.named_parameters() if _has_a_graph(p)]


def _has_a_graph(p):
    """Whether a living graph leads to the parameter: its node then is the same each time it is asked for."""
    node = p.view_as(p).grad_fn.next_functions[0][0]
    node.metadata["seen"] = True
    del node
    return "seen" in p.view_as(p).grad_fn.next_functions[0][0].metadata


def test_a_deferred_zero_is_reported():
    _, optimizer, balancer = parts(defer_checks=True)
    iteration(balancer, optimizer, batch(0), batch(1))
    with torch.no_grad():
        for p in balancer.weighting.parameters():
            p.fill_(1e4)  # a saturated output
    iteration(balancer, optimizer, batch(2), batch(3))
    with pytest.raises(MetaKDError, match="saturated or constant"):
        balancer.read_checks()


def test_checks_are_read_in_order_and_in_their_own_numbers():
    seen = []
    with read_at_end():
        check(lambda a, b: seen.append((a, b)), torch.tensor(3), torch.tensor(-1))
        check(seen.append, torch.tensor(0.5))
        assert not seen
    assert seen == [(3, -1), 0.5]
    check(seen.append, torch.tensor(7.0))
    assert seen[-1] == 7


def test_a_failed_check_explains_the_error_that_it_caused():
    def failing(number):
        raise MetaKDError(f"{number} was wrong")

    with pytest.raises(MetaKDError, match=r"1\.0 was wrong") as caught, read_at_end():
        check(failing, torch.tensor(1.0))
        raise IndexError("out of range")
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(IndexError), read_at_end():
        check(lambda number: None, torch.tensor(1.0))
        raise IndexError("out of range")


def test_a_tensor_is_checked_again_once_it_was_written_to():
    with torch.inference_mode():
        unwritable = torch.arange(3)  # it has no count of what was written to it
    labels = torch.arange(3)
    with read_at_end():
        for values in (labels, unwritable):
            assert not checked_before(values, 3)
            assert checked_before(values, 3)
            assert not checked_before(values, 4)
        labels.add_(1)
        assert not checked_before(labels, 3)
    assert not checked_before(labels, 3)


def test_a_sum_that_overflows_is_no_fault_by_itself():
    values, said = torch.full((4,), torch.finfo(torch.float32).max), []
    check_finite(values, lambda: said.extend(values[~values.isfinite()].tolist()))
    assert not said


@pytest.fixture
def capture(monkeypatch):
    """As in the capture of a CUDA graph, where no number can be read."""

    def begin():
        monkeypatch.setattr("metakd.balancer.capturing", lambda: True)
        monkeypatch.setattr("metakd._basics.checks.capturing", lambda: True)

    return begin


def test_a_captured_call_reads_nothing_and_its_checks_are_read_after_each_replay(capture):
    _, optimizer, balancer = parts(defer_checks=True)
    iteration(balancer, optimizer, batch(0), batch(1))
    train, meta = batch(2), batch(3)
    capture()
    found = count(lambda: iteration(balancer, optimizer, train, meta))
    assert not found.syncs
    *_, waiting = balancer._late
    balancer.read_checks()
    balancer.read_checks()
    waiting._checks[0][0][1].fill_(7)  # a replay writes to the same memory: the largest label
    with pytest.raises(MetaKDError, match="label 7 is out of range"):
        balancer.read_checks()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "use balancer.capture"),
        ({"defer_checks": True, "accumulate": 2}, "make calls differ"),
        ({"defer_checks": True, "every": 2}, "make calls differ"),
        ({"defer_checks": True, "verify": False}, "with verify=True"),
    ],
)
def test_what_cannot_be_captured_is_named(capture, options, words):
    _, optimizer, balancer = parts(**options)
    iteration(balancer, optimizer, batch(0), batch(1))
    capture()
    with pytest.raises(MetaKDError, match=f"cannot be captured in a CUDA graph: .*{words}"):
        balancer(batch(2), batch(3))


def test_without_a_call_nothing_is_checked_in_a_capture(capture):
    """Terms alone in a user's own graph: nobody could read their checks."""
    capture()
    wrong = torch.randn(2, 3), Batch(None, torch.tensor([0, 7]))
    found = count(lambda: Normalised(LossMLP(2, 2))(torch.randn(2, 2), wrong[1]))
    assert not found.syncs
    with pytest.raises(IndexError):  # torch's own
        CrossEntropy()(*wrong)


def test_a_student_that_draws_cannot_be_captured(capture):
    student, optimizer, balancer = parts(defer_checks=True)
    student[2] = nn.Dropout(0.5)
    iteration(balancer, optimizer, batch(0), batch(1))
    capture()
    with pytest.raises(MetaKDError, match="draws random numbers"):
        balancer(batch(2), batch(3))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("known", [True, False])
def test_a_number_that_implies_a_check_takes_the_place_of_its_sum(wrong, known):
    said, values = [], torch.tensor([1.0, wrong])

    def block(values):
        with read_at_end():
            check_finite(values, lambda: said.append(values))
            if known:
                implied(values[1], values)

    sums = count(lambda: block(values)).kernels["sum"]
    assert len(said) == 1 and sums == (0 if known else 1)
    block(torch.ones(2))
    assert len(said) == 1


@pytest.mark.parametrize("options", [{}, {"order": "simultaneous"}, {"accumulate": 2}, {"every": 2}], ids=str)
def test_weights_that_are_not_finite_are_named(options):
    _, optimizer, balancer = parts(**options)
    iteration(balancer, optimizer, batch(0), batch(1))
    with torch.no_grad():
        next(balancer.weighting.parameters()).fill_(math.nan)
    for _ in range(2):
        with pytest.raises(MetaKDError, match="the weight model returned NaN or infinite weights"):
            balancer(batch(2), batch(3))
    with pytest.raises(MetaKDError, match="the weight model returned NaN or infinite weights"):
        balancer.loss(batch(2))


def test_a_value_of_a_constant_is_made_once_in_a_call():
    made, values = [], torch.ones(2)

    def make():
        return made.append(1) or len(made)

    assert [once(values, "key", make) for _ in range(2)] == [1, 2]
    with read_at_end():
        assert [once(values, "key", make) for _ in range(2)] == [3, 3]
        assert once(values, "other", make) == 4
        values.add_(1)
        assert once(values, "key", make) == 5
        assert once(values.clone(), "key", make) == 6
    with read_at_end():
        assert once(values, "key", make) == 7


class RootOfZero(nn.Module):
    """Finite weights whose derivative is NaN while it is on."""

    def __init__(self):
        super().__init__()
        self.layer, self.on = nn.Linear(2, 2), False

    def forward(self, features, batch):
        z = self.layer(features)
        return torch.sigmoid(z + (z * 0).abs().sqrt() if self.on else z)


@pytest.mark.parametrize("options", [{}, {"order": "simultaneous"}, {"accumulate": 2}], ids=str)
def test_a_broken_derivative_of_the_weight_model_is_named_and_does_not_stay(options):
    model = RootOfZero()
    _, optimizer, balancer = parts(weighting=model, features=lambda losses, *_: losses, **options)
    iteration(balancer, optimizer, batch(0), batch(1))
    before, model.on = [p.clone() for p in model.parameters()], True
    with pytest.raises(MetaKDError, match=r"hypergradient of 'layer\.weight', 'layer\.bias' is NaN .* weights and"):
        balancer(batch(2), batch(3))
    assert all(map(torch.equal, before, model.parameters()))
    model.on = False
    for seed in (4, 6):
        iteration(balancer, optimizer, batch(seed), batch(seed + 1))
    assert not all(map(torch.equal, before, model.parameters()))


def test_a_broken_gradient_of_the_losses_is_named():
    term = lambda z, batch: (z[:, 0] * 0).abs().sqrt()  # noqa: E731
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, {"hard": CrossEntropy(), "root": term}, optimizer=optimizer)
    with pytest.raises(MetaKDError, match=r"gradient of the losses .* NaN .* in 'weight', 'bias' although"):
        balancer(batch(0), batch(1))


def test_a_batch_that_was_refilled_is_not_blamed():
    _, optimizer, balancer = parts(defer_checks=True)
    iteration(balancer, optimizer, batch(0), batch(1))
    train = faults()["NaN"][0]
    balancer(train, batch(1))
    train[0].copy_(batch(5)[0])
    with pytest.raises(MetaKDError, match=r"for sample 0 .* was written to before this was read: call"):
        balancer.read_checks()


def test_features_that_write_to_the_losses_are_refused():
    _, _, balancer = parts(weighting=nn.Linear(2, 2), features=lambda losses, *_: losses.mul_(0.1))
    with pytest.raises(MetaKDError, match=r"wrote to the losses .* losses\.clone"):
        balancer.weights(batch(0))


def test_what_was_made_of_a_tensor_is_forgotten_with_it():
    with read_at_end() as waiting:
        tensor = torch.ones(2)
        assert once(tensor, "key", object) is once(tensor, "key", object) and len(waiting._made) == 1
        del tensor
        assert not waiting._made
