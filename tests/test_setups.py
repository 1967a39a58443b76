"""What people do in training loops besides the plain step: hypergradients stay exact, the steps the user's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from metakd import Batch, BilevelLossBalancer, MetaKDError, estimators
from metakd.terms import CrossEntropy, SoftTarget
from tests.docs.pages import execute
from tests.zoo import QUIET

pytestmark = QUIET

CLASSES = 3
HARD = {"hard": CrossEntropy(), "smooth": CrossEntropy(label_smoothing=0.3)}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def cnn():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).double()


def batch(*shape, size=6):
    return torch.randn(size, *(shape or (4,))).double(), torch.randint(CLASSES, (size,))


def losses_of(outputs, y):
    return torch.stack([F.cross_entropy(outputs, y, reduction="none", label_smoothing=s) for s in (0.0, 0.3)], dim=1)


def by_hand(student, rates, batch, meta_batch, weights):
    """The influence by a double backward through a copy of the student, one gradient step at these learning rates."""
    student, weights = copy.deepcopy(student), weights.clone().requires_grad_()
    params = {name: p for name, p in student.named_parameters() if p.requires_grad}
    losses = losses_of(functional_call(student, params, batch[0]), batch[1])
    g = torch.autograd.grad((weights * losses).sum() / len(losses), list(params.values()), create_graph=True)
    ahead = {name: p - rates[name] * d for (name, p), d in zip(params.items(), g, strict=True)}
    meta_loss = F.cross_entropy(functional_call(student, ahead, meta_batch[0]), meta_batch[1])
    return len(losses) * torch.autograd.grad(meta_loss, weights)[0]


def rates_of(student, optimizer):
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in student.named_parameters() if p.requires_grad}


def checked_call(balancer, train, meta, bare=None, rates=None):
    """A call whose influence is compared with the one by hand; the weight model has not moved in it."""
    bare = bare or balancer.student
    before = copy.deepcopy(bare)
    loss = balancer(train, meta)
    expected = by_hand(before, rates or rates_of(bare, balancer.optimizer), train, meta, balancer.report.weights)
    torch.testing.assert_close(balancer.report.influence, expected, rtol=1e-9, atol=1e-12)
    return loss


def gradients(student):
    return [None if p.grad is None else p.grad.clone() for p in student.parameters()]


def build(student, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9)
    return BilevelLossBalancer(student, options.pop("terms", HARD), optimizer=optimizer, **options)


def test_gradients_over_micro_batches():
    student, meta = mlp(), batch()
    balancer, parts = build(student, accumulate=4), [batch() for _ in range(8)]
    before = copy.deepcopy(balancer.weighting.state_dict())
    for step in (0, 4):
        plain = []
        for part in parts[step : step + 4]:
            loss = checked_call(balancer, part, meta) if part is not parts[step + 3] else balancer(part, meta)
            (loss / 4).backward()
            plain.append((balancer.report.weights * losses_of(student(part[0]), part[1])).sum() / 6 / 4)
        expected = torch.autograd.grad(sum(plain), list(student.parameters()))
        torch.testing.assert_close(gradients(student), list(expected), rtol=1e-12, atol=1e-15)
        assert balancer.state_dict()["pending_count"] == 0
        balancer.optimizer.step()
        balancer.optimizer.zero_grad()
    steps = balancer.weighting_optimizer.state_dict()["state"][0]["step"]
    assert steps == 2 and any(not torch.equal(v, before[k]) for k, v in balancer.weighting.state_dict().items())


def real_meta_loss(balancer, train, meta, clip=None):
    """The meta loss after the user's own step, which the report's is the forecast of."""
    balancer.optimizer.zero_grad()
    balancer(train, meta).backward()
    if clip is not None:
        assert nn.utils.clip_grad_norm_(balancer.student.parameters(), clip) > clip
    balancer.optimizer.step()
    return F.cross_entropy(balancer.student(meta[0]), meta[1]).detach()


def test_clipping_is_the_users_step_alone():
    student, train, meta = mlp(), batch(), batch()
    balancer = build(student, torch.optim.SGD(student.parameters(), lr=0.5), accumulate=9)
    for _ in range(2):
        loss = checked_call(balancer, train, meta)
        balancer.optimizer.zero_grad()
        loss.backward()
        plain = torch.autograd.grad(
            (balancer.report.weights * losses_of(student(train[0]), train[1])).sum() / 6, list(student.parameters())
        )
        norm = nn.utils.clip_grad_norm_(student.parameters(), 0.01)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in plain]).norm())
        balancer.optimizer.step()


@pytest.mark.parametrize("inner", ["sgd", "mirror", "chain"])
def test_only_a_chain_looks_ahead_along_clipped_steps(inner):
    student, train, meta = mlp(), batch(), batch()
    chain = torchopt.chain(torchopt.clip_grad_norm(max_norm=0.05), torchopt.sgd(lr=0.5))
    balancer = build(
        student,
        torch.optim.SGD(student.parameters(), lr=0.5),
        accumulate=9,
        inner=chain if inner == "chain" else inner,
    )
    real = real_meta_loss(balancer, train, meta, clip=0.05)
    assert bool((balancer.report.meta_loss - real).abs() < 1e-12) == (inner == "chain")


def test_one_cycle():
    student, meta = mlp(), batch()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4)
    balancer, seen = build(student, optimizer, accumulate=9), set()
    for _ in range(4):
        loss = checked_call(balancer, batch(), meta)
        seen.add(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert len(seen) == 4


@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_a_warm_up_from_zero(inner):
    student, meta = mlp(), batch()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
    balancer = build(student, optimizer, accumulate=2, inner=inner)
    before = balancer.state_dict()
    for step in range(3):
        balancer(batch(), meta).backward()
        assert (balancer.report.skipped is None) == (balancer.report.influence is not None) == (step > 0)
        assert balancer.state_dict()["pending_count"] == step % 2
        if step == 0:
            assert "the learning rate is 0" in balancer.report.skipped
            torch.testing.assert_close(balancer.weighting.state_dict(), before["weighting"], rtol=0, atol=0)
        optimizer.step()
        scheduler.step()


def test_windows_in_a_warm_up_from_zero():
    student, meta = mlp(), batch()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    balancer, skipped = build(student, optimizer, estimator=estimators.Adjoint()), []
    before = copy.deepcopy(balancer.weighting.state_dict())
    for step, part in enumerate(balancer.windows([batch() for _ in range(4)], [meta], 2)):
        if step % 2 == 0:
            report = balancer.report
            skipped.append(report.skipped)
            assert report.losses.shape == report.weights.shape == (6, 2)
        if step < 2:
            torch.testing.assert_close(balancer.weighting.state_dict(), before, rtol=0, atol=0)
        balancer.loss(part).backward()
        optimizer.step()
        scheduler.step()
    assert "learning rate is 0" in skipped[0] and skipped[1] is None


def test_groups_with_rates_and_decays_of_their_own():
    student, meta = mlp(), batch()
    groups = [
        {"params": student[0].parameters(), "lr": 0.0},
        {"params": [student[2].weight], "lr": 0.4, "weight_decay": 0.1},
        {"params": [student[2].bias, *student[4].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    balancer = build(student, optimizer, accumulate=9)
    for _ in range(2):
        loss = checked_call(balancer, batch(), meta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_mirror_of_groups_takes_the_real_step(optimizer):
    student, meta = mlp(), batch()
    groups = [
        {"params": student[:4].parameters(), "lr": 0.2, "weight_decay": 0.1},
        {"params": student[4].parameters(), "weight_decay": 0.0},
    ]
    balancer = build(student, optimizer(groups, lr=0.01), accumulate=9, inner="mirror")
    for _ in range(3):
        real = real_meta_loss(balancer, batch(), meta)
        torch.testing.assert_close(balancer.report.meta_loss, real, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ema_first", [True, False])
def test_a_moving_average_of_the_student(ema_first):
    def trained(balanced):
        student = cnn()
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        balancer = build(student, optimizer, accumulate=9)
        if not ema_first:
            average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        meta = batch(3, 7, 7)
        for part in [batch(3, 7, 7) for _ in range(3)]:
            optimizer.zero_grad()
            with torch.no_grad():
                weights = balancer.weights(part)
            loss = (weights * losses_of(student(part[0]), part[1])).sum() / 6
            (balancer(part, meta) if balanced else loss).backward()
            optimizer.step()
            average.update_parameters(student)
        return average.state_dict()

    torch.manual_seed(1)
    plain = trained(False)
    torch.manual_seed(1)
    torch.testing.assert_close(
        {k: v for k, v in trained(True).items() if "running" not in k and "batches" not in k},
        {k: v for k, v in plain.items() if "running" not in k and "batches" not in k},
        rtol=1e-10,
        atol=1e-12,
    )


def test_the_average_as_the_teacher():
    student = cnn()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(2.0)}
    balancer = build(student, terms=terms, teacher=average)
    meta, outputs = batch(3, 7, 7), []
    for part in [batch(3, 7, 7)] * 2:
        before = copy.deepcopy(average.state_dict())
        twin_student = copy.deepcopy(student)
        twin = build(twin_student, terms=terms, weighting=copy.deepcopy(balancer.weighting))
        twin.features = balancer.features
        with torch.no_grad():
            outputs.append(copy.deepcopy(average).eval()(part[0]))
        loss = balancer(part, meta)
        twin(Batch(*part, teacher=outputs[-1]), meta)
        assert torch.equal(balancer.report.influence, twin.report.influence)
        torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)
        assert average.training and all(p.grad is None for p in average.parameters())
        loss.backward()
        balancer.optimizer.step()
        average.update_parameters(student)
    assert not torch.equal(*outputs)


def compiled(student, **options):
    return torch.compile(student, **options)


def compiled_in_place(student, **options):
    student.compile(**options)
    return student


def compiled_part(student, **options):
    student[2] = torch.compile(student[2], **options)
    return student


@pytest.mark.parametrize("accumulate", [1, 9])
@pytest.mark.parametrize("way", [compiled, compiled_in_place, compiled_part])
def test_compiled_students(way, accumulate):
    reference, meta, parts = mlp(), batch(), [batch() for _ in range(2)]
    student = way(mlp(), backend="aot_eager")
    runs = [build(student, accumulate=accumulate), build(reference, accumulate=accumulate)]
    runs[0].weighting.load_state_dict(runs[1].weighting.state_dict())
    for part in parts:
        for balancer in runs:
            balancer.optimizer.zero_grad()
            balancer(part, meta).backward()
        for found in ("influence", "weights"):
            values = [getattr(balancer.report, found) for balancer in runs]
            torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients(student), gradients(reference), rtol=1e-9, atol=1e-12)
        for balancer in runs:
            balancer.optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_channels_last(accumulate):
    reference, student = cnn(), cnn().to(memory_format=torch.channels_last)
    runs = [build(student, accumulate=accumulate), build(reference, accumulate=accumulate)]
    runs[0].weighting.load_state_dict(runs[1].weighting.state_dict())
    parts = [batch(3, 7, 7) for _ in range(3)]
    for balancer, layout in zip(runs, (torch.channels_last, torch.contiguous_format), strict=True):
        train, meta, more = ((x.to(memory_format=layout), y) for x, y in parts)
        balancer(train, meta).backward()
        assert all(p.grad.is_contiguous(memory_format=layout) for p in balancer.student.parameters() if p.ndim == 4)
        balancer.optimizer.step()
        balancer.meta_step([more], meta)
    for a, b in zip(gradients(student), gradients(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    a, b = ([p.grad for p in balancer.weighting.parameters()] for balancer in runs)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_frozen_layers_and_thawing():
    student, meta = mlp(), batch()
    student[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.2)
    balancer = build(student, optimizer, accumulate=9)
    checked_call(balancer, batch(), meta).backward()
    assert gradients(student[0]) == [None, None]
    student[0].requires_grad_(True)
    with pytest.raises(MetaKDError, match=r"not in the optimizer: \['0.weight', '0.bias'\]; add them"):
        balancer(batch(), meta)
    optimizer.add_param_group({"params": student[0].parameters(), "lr": 0.05})
    checked_call(balancer, batch(), meta).backward()
    assert None not in gradients(student[0])


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode")  # checkpoints of torch 2.11
def test_activation_checkpoints():
    class Recomputing(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.layers, self.reentrant = mlp(), reentrant

        def forward(self, x):
            if self.reentrant is None:
                return self.layers(x)
            return self.layers[4](checkpoint(self.layers[1:4], self.layers[0](x), use_reentrant=self.reentrant))

    train, meta = batch(), batch()
    runs = [build(Recomputing(reentrant), accumulate=9) for reentrant in (None, False, True)]
    runs[1].weighting.load_state_dict(runs[0].weighting.state_dict())
    checked_call(runs[0], train, meta).backward()
    runs[1](train, meta).backward()
    torch.testing.assert_close(runs[0].report.influence, runs[1].report.influence, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(runs[0].student), gradients(runs[1].student), rtol=1e-12, atol=1e-14)
    with pytest.raises(MetaKDError, match="use_reentrant=False"):
        runs[2](train, meta)


def test_the_recipes_run():
    execute("docs/training_setups.md", scope := {})
    assert scope["last_meta_loss"].isfinite() and scope["balancer"].report.skipped is None


OTHERS = [torch.optim.Rprop, torch.optim.Adadelta, torch.optim.LBFGS]


@pytest.mark.parametrize("kind", OTHERS)
def test_optimizers_that_no_mirror_follows(kind):
    student, meta = mlp(), batch()
    balancer = build(student, kind(student.parameters(), lr=0.01), accumulate=9)
    for part in [batch() for _ in range(2)]:
        checked_call(balancer, part, meta)

        def closure(part=part):
            balancer.optimizer.zero_grad()
            loss = balancer.loss(part)
            loss.backward()
            return loss

        before = closure()
        balancer.optimizer.step(closure)
        assert closure() < before
    with pytest.raises(MetaKDError, match=f"cannot follow {kind.__name__}; .* Use inner='sgd'"):
        build(student, balancer.optimizer, inner="mirror")


def test_two_optimizers_side_by_side():
    student, meta = mlp(), batch()
    first = torch.optim.SGD(student[:2].parameters(), lr=0.4, momentum=0.9)
    second = torch.optim.AdamW(student[2:].parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5)
    with pytest.raises(MetaKDError, match="4 trainable parameter"):
        build(student, first)
    balancer = build(student, [first, second], accumulate=9)
    for step in range(3):
        rates = {name: 0.4 * 0.5**step if name.startswith("0.") else 0.05 for name, _ in student.named_parameters()}
        loss = checked_call(balancer, batch(), meta, rates=rates)
        student.zero_grad()
        loss.backward()
        first.step(), second.step(), scheduler.step()
