"""Autocast, gradient scalers and half-precision students: hypergradients stay float32's, overflow an event."""

import copy
import gc
import re
import runpy
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metakd import Batch, BilevelLossBalancer, MetaKDError, estimators
from metakd._virtual.kernels import differentiable_kernels
from metakd.terms import CrossEntropy, SoftTarget
from tests.distributed.pair import Pair
from tests.slow import slow_but
from tests.tally import Tally
from tests.zoo import CHECKPOINTS_HAVE_FORWARD_MODE, QUIET, TwoLevels

pytestmark = QUIET

CLASSES = 5
BF16, FP16 = torch.bfloat16, torch.float16
# Distance from float32's hypergradient over the latter's norm. float16 runs virtual passes in float32; what is left is
# the rounding of the training pass's losses, from which the weight model computes its weights.
TOLERANCE = {BF16: 0.04, FP16: 2e-3}


def cnn():
    body = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    body += [nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def transformer():
    layers = [nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, CLASSES))


def mlp():
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


NETS = {"mlp": (mlp, (12,)), "cnn": (cnn, (3, 8, 8)), "transformer": (transformer, (6, 16))}


class Island(nn.Module):
    """Its head is kept out of autocast by the user."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


class Inside(nn.Module):
    """Switches autocast on by itself, and gives float32 back, as Accelerate makes a model do."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.module(x).float()


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def setting(name="mlp", lr=0.1, cast=torch.float32, size=32):
    """A student, its balancer's other parts, and batches; the same ones at every call."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    student, teacher = build().to(cast), build().to(cast)
    batches = [(torch.randn(size, *shape).to(cast), torch.randint(CLASSES, (size,))) for _ in range(6)]
    return student, teacher, torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9), batches


def build(student, teacher, optimizer, **options):
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(4.0)}
    return BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher, **options)


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def state(balancer):
    """Copies of all that learns."""
    found = copy.deepcopy((balancer.state_dict(), balancer.student.state_dict()))
    del found[0]["terms"]
    return found


def distance(found, expected):
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def hypergradients(name, dtype, calls, lr=0.1, **options):
    """Influence and hypergradient of the last of some training steps, all under autocast."""
    student, teacher, optimizer, batches = setting(name, lr)
    balancer = build(student, teacher, optimizer, **options)
    for batch in batches[:calls]:
        with autocast(dtype):
            loss = balancer(batch, batches[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [balancer.report.influence], [p.grad for p in balancer.weighting.parameters()]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("lr", [0.1, 1e-5])
def test_hypergradients_are_float32s(name, dtype, lr):
    expected, found = (hypergradients(name, d, calls=1, lr=lr) for d in (None, dtype))
    assert distance(found[0], expected[0]) < TOLERANCE[dtype]
    assert distance(found[1], expected[1]) < TOLERANCE[dtype]
    assert all(g.dtype == torch.float32 for g in (*found[0], *found[1]))


@pytest.mark.parametrize("options", [dict(accumulate=5), dict(every=2), dict(inner="mirror")], ids=str)
@pytest.mark.parametrize("name", slow_but(["mlp"], NETS))
def test_in_a_run_too(name, options):
    expected, found = (hypergradients(name, dtype, calls=4, **options) for dtype in (None, BF16))
    assert distance(found[0], expected[0]) < 0.1  # the students have gone apart by three steps in bfloat16
    assert distance(found[1], expected[1]) < 0.1


@pytest.mark.parametrize(
    "estimator", [estimators.Adjoint(), estimators.Unroll(), estimators.Adjoint("forward")], ids=str
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", slow_but(["mlp"], NETS))
def test_through_several_steps(name, dtype, estimator):
    student, teacher, optimizer, batches = setting(name)
    balancer = build(student, teacher, optimizer, estimator=estimator)
    before = copy.deepcopy(balancer.state_dict())
    found = {}
    for d in (None, dtype):
        balancer.load_state_dict(before)
        with autocast(d):
            balancer.meta_step(batches[:3], batches[-1])
        found[d] = [p.grad.clone() for p in balancer.weighting.parameters()]
    assert distance(found[dtype], found[None]) < TOLERANCE[dtype]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_user_gets_the_plain_loops_gradients_to_the_bit(dtype, accumulate):
    torch.manual_seed(0)
    student, (x, y) = Island(), (torch.randn(8, 12), torch.randint(CLASSES, (8,)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [CrossEntropy()], optimizer=optimizer, accumulate=accumulate)
    with autocast(dtype):
        loss = balancer((x, y), (x, y))
    loss.mul(16).backward()
    found = [p.grad for p in student.parameters()]
    optimizer.zero_grad()
    with autocast(dtype):
        losses = F.cross_entropy(student(x), y, reduction="none")
    ((balancer.report.weights[:, 0] * losses).sum() / 8).mul(16).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, student.parameters(), strict=True))


def train_step(balancer, scaler, batch, meta_batch):
    with autocast(FP16):
        loss = balancer(batch, meta_batch)
    balancer.optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(balancer.optimizer)
    scaler.update()
    return loss


@pytest.mark.parametrize("meta", [True, False])
def test_overflow_in_the_forward_pass_is_left_to_the_scaler(meta):
    student, teacher, optimizer, batches = setting()
    balancer, scaler = build(student, teacher, optimizer, accumulate=2), torch.amp.GradScaler("cpu", init_scale=256.0)
    train_step(balancer, scaler, batches[0], batches[-1])
    before = state(balancer)
    before[0]["calls"] += 1
    (x, y), meta_batch = batches[1], batches[-1] if meta else None
    loss = train_step(balancer, scaler, (1e6 * x, y), meta_batch)
    after = state(balancer)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not loss.isfinite() and scaler.get_scale() == 128
    assert "float16 overflowed: term 'hard' is" in balancer.report.skipped and balancer.report.influence is None
    assert torch.equal(balancer.report.weights, torch.ones(32, 2))
    train_step(balancer, scaler, batches[2], batches[-1])
    assert balancer.report.skipped is None and balancer.state_dict()["pending_count"] == 0
    balancer((1e6 * x, y), meta_batch)  # in float32 nothing overflows
    with pytest.raises(MetaKDError, match="'hard' is nan for sample 0 of the batch"), autocast(BF16):
        balancer((x / 0, y), meta_batch)


def test_a_step_that_the_scaler_skips_teaches_what_float32_teaches():
    student, teacher, optimizer, batches = setting()
    balancer, scaler = build(student, teacher, optimizer), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(student.state_dict())
    train_step(balancer, scaler, batches[0], batches[-1])
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() < 2.0**40 and balancer.report.skipped is None
    expected = hypergradients("mlp", None, calls=1)[1]
    assert distance([p.grad for p in balancer.weighting.parameters()], expected) < TOLERANCE[FP16]


def overflowing_on_one(rank):
    """A call in which rank 1's batch overflows, and one in which none does."""
    student, _, _, batches = setting()
    wrapped = DistributedDataParallel(student)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(wrapped, {"hard": CrossEntropy()}, optimizer=optimizer)
    scaler, skipped = torch.amp.GradScaler("cpu"), []
    for size in (1e6 if rank else 1.0, 1.0):
        train_step(balancer, scaler, (size * batches[rank][0], batches[rank][1]), batches[-1])
        skipped.append(balancer.report.skipped)
    return skipped, [flat(module.parameters()) for module in (student, balancer.weighting)]


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_one_on_all(tmp_path):
    pair = Pair(tmp_path)
    try:
        (first, ours), (second, theirs) = pair(overflowing_on_one)
    finally:
        pair.close()
    assert "another rank" in first[0] and "'hard' is" in second[0] and first[1] is second[1] is None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_teachers_that_overflow():
    student, teacher, optimizer, batches = setting()
    with torch.no_grad():
        teacher[-1].weight.mul_(1e7)
    balancer, scaler = build(student, teacher, optimizer), torch.amp.GradScaler("cpu")
    train_step(balancer, scaler, batches[0], batches[-1])
    assert "term 'soft' is nan" in balancer.report.skipped


def influence(dtype, terms, lr):
    """Of float32 weights that do not depend on what the training pass computed."""
    student, _, optimizer, batches = setting(lr=lr)
    balancer = BilevelLossBalancer(
        student, terms, optimizer=optimizer, features=lambda losses, *_: torch.ones_like(losses)
    )
    with autocast(dtype):
        balancer(batches[0], batches[-1])
    return balancer.report.influence


HARD_FOR_FLOAT16 = {
    "the gradient is below float16's range": ({"tiny": lambda z, batch: 1e-8 * CrossEntropy()(z, batch)}, 1e8),
    "the term's product is": ({"norm": lambda z, batch: 1e6 * ((1e-4 * z) @ (1e-4 * z).T).diagonal()}, 1.0),
}


@pytest.mark.parametrize("case", HARD_FOR_FLOAT16)
def test_what_float16_cannot_hold_is_exact(case):
    terms, lr = HARD_FOR_FLOAT16[case]
    assert distance([influence(FP16, terms, lr)], [influence(None, terms, lr)]) < 1e-5


class Bare(nn.Module):
    """A weight model that does not know of other types than its own."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, features, batch):
        return torch.sigmoid(self.layer(features))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("pure", [True, False])
def test_weight_models_see_float32(pure, dtype):
    student, _, optimizer, batches = setting(cast=dtype if pure else torch.float32)
    seen, model = [], Bare(CLASSES)
    model.layer.register_forward_hook(lambda layer, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    terms = [lambda z, batch: z.square().sum(1), lambda z, batch: z.abs().sum(1)]
    balancer = BilevelLossBalancer(
        student, terms, optimizer=optimizer, weighting=model, features=lambda losses, outputs, batch: outputs
    )
    with autocast(None if pure else dtype):
        balancer(batches[0], batches[-1])
        balancer.loss(batches[0])
    assert set(seen) == {balancer.report.losses.dtype} == {torch.float32}


@pytest.mark.parametrize("options", [{}, dict(accumulate=3, inner="mirror")], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", slow_but(["mlp"], NETS))
def test_half_precision_students_look_ahead_in_float32(name, dtype, options):
    student, teacher, optimizer, batches = setting(name, cast=dtype)
    options = {**options, "estimator": estimators.Adjoint()}
    balancer = build(student, teacher, optimizer, **options)
    twin = copy.deepcopy(student).float()
    rule = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    weighting = copy.deepcopy(balancer.weighting)
    reference = build(twin, copy.deepcopy(teacher).float(), rule, weighting=weighting, **options)
    before = copy.deepcopy(dict(student.named_parameters()))
    assert {p.dtype for p in balancer.weighting.parameters()} == {torch.float32}
    for one, kind in ((balancer, dtype), (reference, torch.float32)):
        torch.manual_seed(1)
        one(*((x.to(kind), y) for x, y in (batches[0], batches[-1]))).backward()
        assert {p.grad.dtype for p in one.student.parameters()} == {kind}
    assert distance([balancer.report.influence], [reference.report.influence]) < TOLERANCE[dtype]
    balancer.load_state_dict(reference.state_dict())
    twin.load_state_dict(student.state_dict())
    teachers = [teacher(batches[i][0]).float() for i in (1, 2)]
    for one in (balancer, reference):
        torch.manual_seed(1)
        known = [Batch(x, y, z) for (x, y), z in zip(batches[1:3], teachers, strict=True)]
        cast = {p.dtype for p in one.student.parameters()}.pop()
        one.meta_step([b._replace(inputs=b.inputs.to(cast)) for b in known], (batches[-1][0].to(cast), batches[-1][1]))
    found, expected = ([p.grad for p in b.weighting.parameters()] for b in (balancer, reference))
    assert distance(found, expected) < 1e-4
    assert all(torch.equal(p, before[k]) and p.dtype == dtype for k, p in student.named_parameters())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_autocast_inside_the_student(name, dtype):
    expected = hypergradients(name, None, calls=1, lr=1e-6)
    student, teacher, optimizer, batches = setting(name, lr=1e-6)
    balancer = build(Inside(student, dtype), teacher, optimizer, accumulate=2)
    loss = balancer(batches[0], batches[-1])
    assert distance([balancer.report.influence], expected[0]) < TOLERANCE[dtype]
    assert distance([p.grad for p in balancer.weighting.parameters()], expected[1]) < TOLERANCE[dtype]
    # A scaler of float16 needs the real backward pass.
    assert (type(loss.grad_fn).__name__ == "_HandOverBackward") == (dtype == BF16)
    assert not torch.is_autocast_enabled("cpu")


def test_a_compiled_student_inside_autocast():
    expected = hypergradients("mlp", None, calls=1)
    for dtype in (BF16, FP16):
        student, teacher, optimizer, batches = setting()
        balancer = build(torch.compile(student, backend="aot_eager"), teacher, optimizer, accumulate=2)
        with autocast(dtype):
            balancer(batches[0], batches[-1])
        assert distance([p.grad for p in balancer.weighting.parameters()], expected[1]) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")  # checkpoints of torch 2.11
def test_recomputed_parts_are_recomputed_in_the_same_precision():
    def gradients(recompute):
        torch.manual_seed(0)
        student = TwoLevels(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()))
        if not recompute:
            student.forward = lambda x: student.head(student.middle(student.first(x)))
        batches = [(torch.randn(9, 4), torch.randint(3, (9,))) for _ in range(4)]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
        balancer = BilevelLossBalancer(student, [CrossEntropy()], optimizer=optimizer, estimator=estimators.Adjoint())
        with autocast(BF16):
            balancer.meta_step(batches[:3], batches[-1])
        return [p.grad.clone() for p in balancer.weighting.parameters()]

    # Without a forward mode of checkpoints the two take different ways, which round differently in bfloat16.
    assert distance(gradients(True), gradients(False)) < (1e-6 if CHECKPOINTS_HAVE_FORWARD_MODE else 4e-3)


def test_casts_of_virtual_parameters_do_not_outlive_their_pass():
    torch.manual_seed(0)
    student, seen = nn.Linear(12, CLASSES), Tally()
    student.register_forward_hook(lambda module, *_: seen(weakref.ref(module.weight)))
    batch, optimizer = (torch.randn(4, 12), torch.randint(CLASSES, (4,))), torch.optim.SGD(student.parameters(), lr=0.1)
    options = dict(optimizer=optimizer, estimator=estimators.Adjoint(), verify=False)
    balancer = BilevelLossBalancer(student, [CrossEntropy()], **options)
    with autocast(BF16):
        balancer.meta_step([batch] * 3, batch)
        gc.collect()
        assert len(seen.seen) == 7 and all(ref() is None for ref in seen.seen)


def test_a_teacher_that_shares_layers_leaves_their_gradients():
    torch.manual_seed(0)
    stem, head = nn.Linear(12, 8), nn.Linear(8, CLASSES)
    student, teacher = nn.Sequential(stem, nn.Tanh(), head), nn.Sequential(stem, nn.ReLU(), nn.Linear(8, CLASSES))
    batch, optimizer = (torch.randn(4, 12), torch.randint(CLASSES, (4,))), torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = build(student, teacher, optimizer)
    with autocast(BF16):
        loss = balancer(batch, batch)
    loss.backward()
    assert bool(stem.weight.grad.any())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_is_what_it_was(dtype):
    student, teacher, optimizer, batches = setting()
    balancer = build(student, teacher, optimizer)
    with autocast(dtype):
        for call in (balancer, lambda b, m: balancer.weights(b), lambda b, m: balancer.meta_step([b], m)):
            call(batches[0], batches[-1])
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype
        with differentiable_kernels(student):
            F.linear(torch.ones(1, 1), torch.ones(1, 1))
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        with pytest.raises(MetaKDError):
            balancer((batches[0][0], batches[0][1] + CLASSES), batches[-1])
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_example_learns_which_labels_to_trust(dtype, capsys):
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples/mixed_precision.py"))
    example["train"]("cpu", dtype, epochs=4)
    said = capsys.readouterr().out
    right, wrong = map(float, re.search(r"weight of the label: (\S+) where .* right, (\S+) where", said).groups())
    assert right > wrong + 0.1 and "no hypergradient" not in said
    assert float(re.search(r"accuracy: (\S+)%", said)[1]) > 80
