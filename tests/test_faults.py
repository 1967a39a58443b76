"""Faults in the middle of a call: everything of the user's is as before, the error says where, training can go on."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from metakd import Batch, BilevelLossBalancer, MetaKDError, estimators, weighting
from metakd.terms import CrossEntropy, SoftTarget
from tests.slow import slow_but
from tests.test_no_trace import assert_same, trace_of


class Watcher(nn.Module):
    """A weight model with every kind of state: parameters, BatchNorm, a tensor kept as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid())
        self.seen = torch.zeros(())

    def forward(self, features, batch):
        self.seen = self.seen + len(features)
        return self.layers(features)


class Fuse:
    """Lets some calls pass, and blows at the next one; with slots, for what objects keep is put back otherwise."""

    __module__ = "torch"

    def __init__(self):
        self.left, self.error, self.blown = None, None, False

    def set(self, left, error):
        self.left, self.error, self.blown = left, error, False

    def __call__(self, *_):
        if self.left is None:
            return
        if self.left == 0:
            self.left, self.blown = None, True
            raise self.error
        self.left -= 1

    def before(self, function):
        return lambda *inputs: (self(), function(*inputs))[1]


PARTS = {
    "term": r"term 'soft' raised ValueError: boom",
    "meta loss": r"term 'meta_loss' raised ValueError: boom",
    "features": r"features function .* raised ValueError: boom",
    "weighting": r"the weight model raised ValueError: boom",
    "batch_fn": r"reading (the batch|the meta batch|batch \d) raised ValueError: boom",
    "teacher": r"the teacher raised ValueError: boom",
    "student": None,  # what these raise stays what it is
    "weight model's optimizer": None,
    "weight model's optimizer, after its step": None,
}


def fused(estimator=None, model=Watcher, *, steps=2, **options):
    """A balancer with a fuse in each of the user's parts, after some steps."""
    torch.manual_seed(0)
    fuses = {part: Fuse() for part in PARTS}
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    teacher = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    teacher[1].eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    model = model()
    mover = torch.optim.Adam(model.parameters(), lr=0.01) if list(model.parameters()) else None
    student.register_forward_hook(fuses["student"])
    teacher[2].register_forward_pre_hook(fuses["teacher"])
    model.register_forward_pre_hook(fuses["weighting"])
    if mover is not None:
        mover.register_step_pre_hook(fuses["weight model's optimizer"])
        mover.register_step_post_hook(fuses["weight model's optimizer, after its step"])
    balancer = BilevelLossBalancer(
        student,
        {"hard": CrossEntropy(), "soft": fuses["term"].before(SoftTarget())},
        optimizer=optimizer,
        teacher=teacher,
        weighting=model,
        weighting_optimizer=mover,
        meta_loss=fuses["meta loss"].before(CrossEntropy()),
        features=fuses["features"].before(lambda losses, outputs, batch: losses),
        batch_fn=fuses["batch_fn"].before(lambda item: Batch(*item)),
        inner="mirror",
        estimator=estimator or estimators.OneStep(),
        **options,
    )
    for _ in range(steps):
        real_step(balancer)
    return balancer, fuses


def items(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def real_step(balancer):
    loss = balancer(items(0), items(1, 7))
    balancer.optimizer.zero_grad()
    loss.backward()
    balancer.optimizer.step()


def call(balancer):
    return balancer(items(2), items(3, 7))


def meta_step(balancer):
    return balancer.meta_step([items(2), items(4, 3)], items(3, 7))


SITUATIONS = {
    "forward": (lambda: fused(), call),
    "reverse": (lambda: fused(estimators.OneStep("reverse")), call),
    "accumulate": (lambda: fused(accumulate=2), call),
    "influence": (lambda: fused(model=lambda: weighting.Rectified(2)), call),
    "finite differences": (lambda: fused(estimators.FiniteDifference()), call),
    "loss": (lambda: fused(), lambda balancer: balancer.loss(items(2))),
    "weights": (lambda: fused(), lambda balancer: balancer.weights(items(2))),
    "Adjoint": (lambda: fused(estimators.Adjoint()), meta_step),
    "Unroll": (lambda: fused(estimators.Unroll()), meta_step),
}

MOVES = ("weight model's optimizer", "weight model's optimizer, after its step")
UNUSED = {  # by the call in that situation
    "accumulate": MOVES,
    "influence": ("weighting", *MOVES),
    "loss": ("meta loss", *MOVES),
    "weights": ("meta loss", *MOVES),
}


def everything(balancer):
    model, teacher = balancer.weighting, balancer.teacher
    return {
        **trace_of(balancer.student, balancer.optimizer, model, teacher),
        "balancer": balancer.state_dict(),
        "weight model": [p.detach().clone() for p in model.parameters() if not is_lazy(p)],
        "its gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "its attributes": [v.clone() for v in vars(model).values() if isinstance(v, torch.Tensor)],
        "its groups": [id(g) for g in balancer.weighting_optimizer.param_groups]
        if balancer.weighting_optimizer
        else [],
        "its kinds": [type(part) for part in (*model.modules(), *model.parameters())],
        "its hooks": [[*part._forward_pre_hooks, *part._load_state_dict_pre_hooks] for part in model.modules()],
        "its places": [id(p) for part in model.modules() for p in part._parameters.values()],
        "report": id(balancer._report),
        "torch's modes": [
            torch.is_grad_enabled(),
            torch._C._is_fwd_grad_enabled(),
            forward_ad._current_level,
            len(_get_current_function_mode_stack()),
        ],
    }


def lasting(balancer):
    """What training goes on with: not the identities, nor the counts of how often something was written to."""
    fleeting = ("identities", "versions", "report", "its groups", "its hooks", "its places", "hooks")
    return {key: value for key, value in everything(balancer).items() if key not in fleeting}


class Interrupt(TorchDispatchMode):
    """Ctrl-C at the n-th operation of torch."""

    def __init__(self, n):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", slow_but(("forward", "Adjoint"), SITUATIONS))
def test_ctrl_c_at_any_operation_changes_nothing(name):
    make, act = SITUATIONS[name]
    (balancer, _), (twin, _) = make(), make()
    with Interrupt(0) as counter:
        act(twin)
    before = everything(balancer)
    for n in range(1, counter.count, max(counter.count // 30, 1)):
        with pytest.raises(KeyboardInterrupt), Interrupt(n):
            act(balancer)
        assert_same(everything(balancer), before, f"operation {n} of {counter.count}")
    twin, _ = make()
    act(twin), real_step(twin)
    expected = lasting(twin)
    balancer, _ = make()
    with pytest.raises(KeyboardInterrupt), Interrupt(counter.count // 2):
        act(balancer)
    act(balancer), real_step(balancer)
    assert_same(lasting(balancer), expected)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("name", "error"),
    [(name, ValueError("boom")) for name in ("forward", "Adjoint")]
    + [
        pytest.param(name, error, marks=pytest.mark.slow)
        for name, error in (
            *((name, ValueError("boom")) for name in ("accumulate", "influence", "weights", "Unroll")),
            *((name, KeyboardInterrupt()) for name in ("forward", "Adjoint")),
        )
    ],
)
def test_a_fault_in_a_part_of_the_users_changes_nothing(name, part, error):
    make, act = SITUATIONS[name]
    balancer, fuses = make()
    before, survived = everything(balancer), set()
    for passing in range(50):
        fuses[part].set(passing, error)
        kind = MetaKDError if PARTS[part] and isinstance(error, Exception) else type(error)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                act(balancer)
        except kind as found:
            assert kind is not MetaKDError or (re.search(PARTS[part], str(found)) and found.__cause__)
            assert_same(everything(balancer), before, f"call {passing}")
        else:
            if not fuses[part].blown:
                break
            # A fault of the forward-mode pass alone is taken for a missing derivative, and reverse mode does it.
            assert "no forward-mode derivative (boom)" in str(said[0].message)
            survived.add(passing)
            balancer, fuses = make()
    assert (passing > 0) == (part not in UNUSED.get(name, ()))
    expected, _ = make()
    act(expected), real_step(expected)
    again, fuses = make()
    for left in sorted(set(range(passing)) - survived):
        fuses[part].set(left, error)
        with pytest.raises((MetaKDError, ValueError, KeyboardInterrupt)):
            act(again)
    fuses[part].set(None, None)
    act(again), real_step(again)
    assert_same(lasting(again), lasting(expected))


def test_a_lazy_weight_model_that_found_its_size_in_a_failing_call_forgets_it():
    def build():
        return fused(model=lambda: weighting.LossMLP(None, 2, hidden=(4,)), steps=0)

    balancer, fuses = build()
    before, random = everything(balancer), torch.get_rng_state()
    for part, left in (("meta loss", 0), ("weighting", 0), ("weighting", 1)):
        fuses[part].set(left, ValueError("boom"))
        with pytest.raises(MetaKDError, match="boom"):
            balancer(items(5, 9), items(6))  # of another size: the generators are elsewhere when the layer is filled
        assert_same(everything(balancer), before)
        assert any(map(is_lazy, balancer.weighting.parameters()))
    twin, _ = build()
    torch.set_rng_state(random)
    expected = call(twin)
    torch.set_rng_state(random)
    assert torch.equal(call(balancer), expected)
    assert_same(lasting(balancer), lasting(twin))


NAN = float("nan")


def sick_inputs(data):
    data[0][2, 1] = NAN


def sick(parameter, value):
    with torch.no_grad():
        parameter[0] = value


SICK = {
    "inputs": (lambda b, x, y: sick_inputs(x), r"nan for sample 0 of the batch.*its inputs hold .* samples \[2\]"),
    "meta": (lambda b, x, y: sick_inputs(y), r"'meta_loss' is nan .* the meta batch.* inputs hold .* samples \[2\]"),
    "teacher": (lambda b, x, y: sick(b.teacher[2].bias, NAN), r"'soft' is nan .*teacher's outputs hold .*\[0, 1, 2"),
    "student": (lambda b, x, y: sick(b.student[4].bias, -torch.inf), r"inf for sample .*student's outputs hold such"),
}  # fmt: skip


@pytest.mark.parametrize("case", SICK)
@pytest.mark.parametrize("steps", [1, 2], ids=["call", "meta step"])
def test_where_nan_and_infinity_come_from_is_said(case, steps):
    spoil, message = SICK[case]
    balancer, _ = fused(estimators.Adjoint())
    batch, meta_batch = items(2), items(3)
    spoil(balancer, batch, meta_batch)
    before = everything(balancer)
    with pytest.raises(MetaKDError, match=message):
        balancer(batch, meta_batch) if steps == 1 else balancer.meta_step([batch] * steps, meta_batch)
    assert repr(everything(balancer)) == repr(before)  # as texts, for NaN is not itself


def test_a_term_that_makes_nan_of_finite_outputs_is_blamed():
    balancer, _ = fused()
    balancer.terms["log"] = lambda outputs, batch: outputs.sum(1).sub(1000).log()
    with pytest.raises(
        MetaKDError, match=r"'log' is nan for sample 0 .*inputs and outputs are finite: look at the term"
    ):
        call(balancer)


def test_an_iterator_in_the_place_of_a_batch_is_named():
    balancer, _ = fused(estimators.Adjoint())
    with pytest.raises(MetaKDError, match="give at least one"):
        balancer.meta_step(iter([]), items(3))
    plain = BilevelLossBalancer(balancer.student, [CrossEntropy()], optimizer=balancer.optimizer)
    with pytest.raises(MetaKDError, match="reading the meta batch: a loader's item of type list_iterator is not"):
        plain(items(2), iter([items(3)]))


def test_running_out_of_memory_in_the_teacher_stays_what_it_is():
    balancer, fuses = fused()
    fuses["teacher"].set(0, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(balancer)
