"""Accelerate: the recipe, its numbers, its checkpoints, and what it does not take."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer, MetaKDError
from metakd.terms import CrossEntropy, SoftTarget

accelerate = pytest.importorskip("accelerate")

TERMS = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
EXAMPLE = "accelerate_loop.py"


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def setting(seed=0):
    """A student, its optimizer, a loader of 4 batches of 10, and a meta batch."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(3, (40,))), batch_size=10, shuffle=True)
    return student, optimizer, loader, (torch.randn(12, 6), torch.arange(12) % 3)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_example_says_what_it_learned_and_resumes(run_example):
    whole = run_example(EXAMPLE)
    losses = [float(x) for x in re.findall(r"meta loss ([\d.]+)", whole)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    (right, wrong), (soft_right, soft_wrong) = (
        map(float, re.search(rf"weight of the {term}: ([\d.]+) .* ([\d.]+) where it is wrong", whole).groups())
        for term in ("label", "teacher")
    )
    assert right > wrong + 0.4 and soft_wrong > soft_right
    resumed = run_example(EXAMPLE, "--resume", "runs/accelerate/epoch-7")
    assert resumed.splitlines() == whole.splitlines()[7:]


def test_a_resumed_run_has_the_same_bits(example, tmp_path):
    train = example(EXAMPLE)["train"]
    student, balancer = train(3, tmp_path)
    torch.randn(7)
    again, resumed = train(3, tmp_path / "again", tmp_path / "epoch-1")
    assert same(student, again) and same(balancer.weighting, resumed.weighting)
    saved = [torch.load(folder / "epoch-3/custom_checkpoint_0.pkl", weights_only=True) for folder in
             (tmp_path, tmp_path / "again")]  # fmt: skip
    assert saved[0]["calls"] == saved[1]["calls"] == 60


@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_numbers_are_those_of_a_plain_loop(inner):
    student, optimizer, loader, meta = setting()
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, teacher=nn.Linear(6, 3), inner=inner)
    losses = []
    for _ in range(2):
        for batch in loader:
            losses.append(balancer(batch, meta))
            optimizer.zero_grad()
            losses[-1].backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()

    plain, accelerator = student, accelerate.Accelerator()
    student, optimizer, loader, meta = setting()
    bare = student
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, teacher=nn.Linear(6, 3), inner=inner)
    found = []
    for _ in range(2):
        for batch in loader:
            found.append(balancer(batch, meta))
            optimizer.zero_grad()
            accelerator.backward(found[-1])
            accelerator.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
    assert torch.equal(torch.stack(found), torch.stack(losses)) and len(found) == 8
    assert accelerator.unwrap_model(student) is bare and same(bare, plain)
    assert found[-1] != found[0]


def test_accumulated_gradients_are_those_of_a_plain_loop():
    student, optimizer, loader, meta = setting()
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, teacher=nn.Linear(6, 3))
    for i, batch in enumerate(loader):
        (balancer(batch, meta) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()

    plain, weighting, accelerator = student, balancer.weighting, accelerate.Accelerator(gradient_accumulation_steps=2)
    student, optimizer, loader, meta = setting()
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, teacher=nn.Linear(6, 3))
    for batch in loader:
        with accelerator.accumulate(student):
            accelerator.backward(balancer(batch, meta))
            optimizer.step()
            optimizer.zero_grad()
    assert same(student, plain) and same(balancer.weighting, weighting)


def test_bfloat16_is_close_to_float32():
    found = {}
    for precision in ("no", "bf16"):
        accelerator = accelerate.Accelerator(mixed_precision=precision)
        student, optimizer, loader, meta = setting()
        student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
        balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, teacher=nn.Linear(6, 3))
        accelerator.backward(balancer(next(iter(loader)), meta))
        assert all(p.grad.dtype == torch.float32 for p in student.parameters())
        found[precision] = balancer.report
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    full, half = found["no"], found["bf16"]
    assert not torch.equal(full.losses, half.losses)  # it was used
    torch.testing.assert_close(half.influence, full.influence, rtol=0.05, atol=0.05 * float(full.influence.abs().max()))
    torch.testing.assert_close(half.hypergradient_norm, full.hypergradient_norm, rtol=0.05, atol=0.0)


def test_a_checkpoint_of_other_terms_is_refused_and_changes_nothing(tmp_path):
    accelerator = accelerate.Accelerator()
    student, optimizer, _, _ = setting()
    student, optimizer = accelerator.prepare(student, optimizer)
    saved = BilevelLossBalancer(student, {"label": CrossEntropy()}, optimizer=optimizer)
    accelerator.register_for_checkpointing(saved)
    accelerator.save_state(tmp_path)
    accelerator._custom_objects.clear()
    other = BilevelLossBalancer(student, {"hard": CrossEntropy()}, optimizer=optimizer)
    before = [p.clone() for p in other.weighting.parameters()]
    accelerator.register_for_checkpointing(other)
    with pytest.raises(MetaKDError, match=r"saved with the terms \['label'\] and has \['hard'\] here"):
        accelerator.load_state(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(before, other.weighting.parameters(), strict=True))


def test_another_models_optimizer_is_refused():
    accelerator = accelerate.Accelerator()
    (student, *_), (_, optimizer, *_) = setting(), setting()
    student, optimizer = accelerator.prepare(student, optimizer)
    with pytest.raises(MetaKDError, match="holds none of the student's trainable parameters"):
        BilevelLossBalancer(student, TERMS, optimizer=optimizer)
