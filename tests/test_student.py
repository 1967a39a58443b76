"""The student as a function: arguments, wrappers, repetition, kernels."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms
from metakd._basics.module_call import call
from metakd._virtual.functional import FunctionalStudent, unwrap
from tests.slow import slow_but
from tests.tally import Tally
from tests.zoo import CHECKPOINTS_HAVE_FORWARD_MODE, ZOO, meet

CE, SMOOTH = terms.CrossEntropy(), terms.CrossEntropy(label_smoothing=0.3)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()

    def forward(self, left, right, scale=1.0):
        return scale * (self.a(left) + self.b(right))


LEFT, RIGHT = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


INPUTS = [(LEFT, RIGHT), [LEFT, RIGHT], {"left": LEFT, "right": RIGHT, "scale": 1.0}]


@pytest.mark.parametrize("inputs", INPUTS, ids=type)
def test_inputs_are_arguments(inputs):
    student = TwoInputs()
    expected = student(LEFT, RIGHT)
    torch.testing.assert_close(call(student, inputs), expected)
    functional = FunctionalStudent(student)
    with functional.untouched() as start:
        outputs, _ = functional.run(functional.detached(), inputs, start)
    torch.testing.assert_close(outputs, expected)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=optimizer)
    batch = (inputs, torch.tensor([0, 1, 2, 0, 1]))
    assert balancer(batch, batch).requires_grad


def test_wrappers_are_looked_through():
    bare = nn.Linear(4, 3)
    assert unwrap(bare) is bare
    assert unwrap(nn.DataParallel(nn.DataParallel(bare))) is bare
    assert unwrap(torch.compile(bare, backend="eager")) is bare


def buffers_at(functional, start):
    """What a pass from there finds in the module's buffers."""
    start.state.put_back({i: value.clone() for i, value in start.state.values.items()})
    return {name: buffer.clone() for name, buffer in functional.module.named_buffers()}


@pytest.mark.parametrize("name", ZOO)
def test_a_run_is_a_pure_function(name):
    student, (x, _), _ = meet(name)
    functional = FunctionalStudent(student)
    with functional.untouched() as start:
        kept = {key: value.clone() for key, value in start.state.values.items()}
        first, end = functional.run(functional.detached(), x, start, wants_end=True)
        again, same_end = functional.run(functional.detached(), x, start, wants_end=True)
        assert kept.keys() == start.state.values.keys()
        assert all(torch.equal(start.state.values[key], value) for key, value in kept.items())
        one, other = buffers_at(functional, end), buffers_at(functional, same_end)
    assert torch.equal(first, again)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(end.rng.cpu, same_end.rng.cpu)


@pytest.mark.parametrize("name", ["batch_norm_cumulative", "dropout", "moving_centre"])
def test_runs_in_a_row_are_calls_in_a_row(name):
    student, (x, _), (meta_x, _) = meet(name)
    functional = FunctionalStudent(student)
    with functional.untouched() as start:
        _, middle = functional.run(functional.detached(), x, start, wants_end=True)
        found, end = functional.run(functional.detached(), meta_x, middle, wants_end=True)
        buffers = buffers_at(functional, end)
    student(x)
    torch.testing.assert_close(found, student(meta_x), rtol=1e-12, atol=1e-12)
    for key, buffer in student.named_buffers():
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-12)


class Recomputed(nn.Module):
    """Checkpoints its middle, and may checkpoint inside of it again."""

    def __init__(self, middle, nested=False):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), middle, nn.Linear(6, 3)
        self.nested, self.passes = nested, Tally()

    def forward(self, x):
        return self.head(checkpoint(self.part, self.first(x), use_reentrant=False))

    def part(self, x):
        self.passes(1)
        return checkpoint(self.middle, x, use_reentrant=False) if self.nested else self.middle(x)


MIDDLES = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()),
    "power_iteration": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh()),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 6, dropout=0.2),
}


@pytest.mark.filterwarnings("ignore:.*in train mode every gradient of spectral norm")
@pytest.mark.parametrize("nested", slow_but([True], [False, True]))
@pytest.mark.parametrize("name", slow_but(("dropout", "batch_norm", "power_iteration"), MIDDLES))
def test_checkpoints_are_recomputed_as_part_of_their_virtual_pass(name, nested):
    batches = [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (5, 6)]
    found = []
    ways = [estimators.OneStep("forward"), estimators.OneStep("reverse"), estimators.Unroll()]
    for estimator in ways if CHECKPOINTS_HAVE_FORWARD_MODE else ways[1:]:
        torch.manual_seed(0)
        student = Recomputed(MIDDLES[name](), nested).double()
        before = {key: value.clone() for key, value in student.state_dict().items()}
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        balancer = BilevelLossBalancer(student, [CE, SMOOTH], optimizer=optimizer, estimator=estimator)
        torch.manual_seed(1)
        balancer.meta_step(batches[:1], batches[1])
        assert len(student.passes.seen) >= 4  # forward and again, at both ends of the step
        found.append(torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()]))
        for key, value in student.state_dict().items():
            assert torch.equal(value, before[key]), key
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-14)
    if name != "power_iteration":  # a constant to autograd
        found = check_hypergradient(balancer, [*batches, *batches], batches[0], directions=1)
        assert max(found.relative_error.values()) < 1e-6


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode derivative")
def test_a_checkpointed_batch_norm_counts_each_training_batch_once():
    student = Recomputed(MIDDLES["batch_norm"]())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [CE, SMOOTH], optimizer=optimizer)
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    balancer(batch, batch)
    assert student.middle[1].num_batches_tracked == 1


class Remembers(nn.Linear):
    """Keeps what it computed."""

    last, cache = None, None

    def forward(self, x):
        self.last = self.other = super().forward(x)
        self.cache = None
        return self.last


def test_tensors_kept_as_attributes_are_put_back():
    student = Remembers(4, 3)
    functional, x = FunctionalStudent(student), torch.randn(5, 4)
    kept = student.last = student.cache = torch.zeros(1)
    with functional.untouched() as start:
        (outputs, last, cache), _ = functional.run(
            functional.detached(), x, start, lambda outputs: (outputs, student.last, student.cache)
        )
        assert last is outputs and cache is None
    assert student.last is kept and student.cache is kept and not hasattr(student, "other")
    student.cache = None
    with functional.untouched():
        student.cache = torch.ones(1)
    assert student.cache is None


@pytest.mark.filterwarnings("ignore:.*in train mode every gradient of spectral norm")
def test_the_hook_of_an_old_norm_leaves_the_real_weight():
    student = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)))
    balancer = BilevelLossBalancer(
        student, [CE, SMOOTH], optimizer=torch.optim.SGD(student.parameters(), lr=0.1), estimator=estimators.Unroll()
    )
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    balancer(batch, batch)
    weight = student[0].weight
    balancer.weights(batch)
    balancer.meta_step([batch], batch)
    assert student[0].weight is weight
    student[0].weight.sum().backward()  # of the real pass: its graph leads to the real parameter
    assert student[0].weight_orig.grad is not None


def test_kernels_are_put_back_after_an_error():
    student, _, _ = meet("lstm")
    functional = FunctionalStudent(student)
    with functional.untouched() as start, pytest.raises(ValueError):
        functional.run(functional.detached(), torch.zeros(()).double(), start)
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_error_of_the_students_own_stays_its_own():
    student, _, _ = meet("mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(student, torch.zeros(5, 3).double())
    with pytest.raises(MetaKDError, match=r"Sequential cannot be called.*float64.*float32.*cast the inputs"):
        call(student, torch.zeros(5, 4))


CHANGES = {
    "attribute": lambda m: setattr(m, "calls", 1),
    "parameter": lambda m: setattr(m, "b", nn.Linear(2, 3)),
    "parameter_of_a_part": lambda m: setattr(m.a, "weight", nn.Parameter(torch.ones(3, 4))),
    "buffer": lambda m: m.register_buffer("seen", torch.zeros(2)),
    "list": lambda m: m.log.append(1),
    "list_at_its_place": lambda m: m.log.__setitem__(0, torch.zeros(1)),
    "set": lambda m: m.known.add("b"),
    "inner_mapping": lambda m: m.cache["parts"].update(x=torch.zeros(1)),
    "hook": lambda m: m.a.register_forward_hook(lambda *_: None),
    "marked_parameter": lambda m: setattr(m.a.weight, "note", [1]),
    "mode": lambda m: m.a.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_later_start_sees_every_change(name):
    student = TwoInputs()
    student.log, student.known, student.cache = [0], {"a"}, {"parts": {}}
    functional = FunctionalStudent(student)
    first = functional.start()
    with functional.since(first):
        same = functional.start()
        assert same.state.places is first.state.places and same.named == first.named
        CHANGES[name](student)
        assert not first.state.unchanged()
        later = functional.start()
    alone = FunctionalStudent(student).start()
    assert {id(p): n for n, p in later.named.items()} == {id(p): n for n, p in alone.named.items()}
    assert {id(t) for *_, t in later.state.tensors} == {id(t) for *_, t in alone.state.tensors}
    assert len(later.state.places.walked) == len(alone.state.places.walked)


def test_a_later_start_has_the_values_of_its_own_time():
    student = nn.BatchNorm1d(3)
    functional = FunctionalStudent(student)
    first = functional.start()
    with functional.since(first), torch.no_grad():
        student.running_mean += 1
        later = functional.start()
        assert later.state.places is first.state.places
        student.running_mean += 1
    values = [start.state.values[id(student.running_mean)].tolist() for start in (first, later)]
    assert values == [[0.0] * 3, [1.0] * 3]


def test_a_parameter_that_forward_replaces_is_the_one_that_is_learned():
    class Renewed(nn.Linear):
        def forward(self, x):
            if self.training:
                self.extra = nn.Parameter(self.extra.detach().clone())
            return super().forward(x) + self.extra

    student = Renewed(4, 3)
    student.extra = nn.Parameter(torch.zeros(3))
    functional = FunctionalStudent(student)
    with functional.since(functional.start()):
        student(torch.ones(2, 4))
        with functional.untouched():
            assert functional.named()["extra"] is student.extra
