"""Lightning: the recipe in automatic and in manual optimization, its numbers and its checkpoints."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer, MetaKDError
from metakd.terms import CrossEntropy, SoftTarget

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory .* exists and is not empty)"),
]

TERMS = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
EXAMPLE = "lightning_module.py"


def student():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data():
    """4 batches of 10, and a meta batch."""
    train = TensorDataset(torch.randn(40, 6), torch.randint(3, (40,)))
    meta = TensorDataset(torch.randn(12, 6), torch.arange(12) % 3)
    return {"train": DataLoader(train, 10), "meta": DataLoader(meta, 12)}


class Module(lightning.LightningModule):
    """The recipe, in automatic or in manual optimization."""

    def __init__(self, manual=False, inner="sgd"):
        super().__init__()
        self.student, self.teacher = student(), nn.Linear(6, 3)
        self.automatic_optimization, self.inner, self.losses = not manual, inner, []

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.student.parameters(), lr=0.05)
        self.balancer = self.balance(optimizer)
        return optimizer

    def balance(self, optimizer):
        return BilevelLossBalancer(self.student, TERMS, optimizer=optimizer, teacher=self.teacher, inner=self.inner)

    def on_fit_start(self):
        if not self.automatic_optimization:
            self.balancer = self.balance(self.optimizers())  # Lightning's wrapper

    def training_step(self, batch, batch_idx):
        loss = self.balancer(batch["train"], batch["meta"])
        self.losses.append(loss.detach())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def fit(module, **options):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, data())
    return module


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_example_says_what_it_learned_and_resumes(run_example):
    whole = run_example(EXAMPLE).splitlines()[-3:]
    (right, wrong), (soft_right, soft_wrong) = (
        map(float, re.match(r"weight of the \w+: ([\d.]+) .* ([\d.]+) where it is wrong", line).groups())
        for line in whole[:2]
    )
    assert right > wrong + 0.4 and soft_wrong > soft_right
    assert float(re.match(r"test accuracy: ([\d.]+)%", whole[2]).group(1)) > 80
    assert run_example(EXAMPLE, "--resume", "runs/lightning/epoch=6.ckpt").splitlines()[-3:] == whole


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_numbers_are_those_of_a_plain_loop(manual, inner):
    torch.manual_seed(0)
    module = fit(Module(manual, inner=inner))

    torch.manual_seed(0)
    plain, teacher = student(), nn.Linear(6, 3)
    torch.manual_seed(1)
    loaders = data()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
    balancer = BilevelLossBalancer(plain, TERMS, optimizer=optimizer, teacher=teacher, inner=inner)
    losses = []
    for _ in range(2):
        for batch in loaders["train"]:
            losses.append(balancer(batch, *loaders["meta"]))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert torch.equal(torch.stack(module.losses), torch.stack(losses)) and len(losses) == 8
    assert same(module.student, plain) and same(module.balancer.weighting, balancer.weighting)
    assert losses[-1] < losses[0]


def test_a_resumed_run_has_the_same_bits(example, tmp_path):
    train = example(EXAMPLE)["train"]
    whole = train(3, tmp_path)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["balancer"]["calls"] == 20
    resumed = train(3, tmp_path / "again", tmp_path / "epoch=0.ckpt")
    assert same(resumed.student, whole.student) and same(resumed.balancer.weighting, whole.balancer.weighting)
    assert resumed.balancer.state_dict()["calls"] == 60


def test_accumulation_and_clipping_are_lightnings_own():
    torch.manual_seed(0)
    module = fit(Module(), accumulate_grad_batches=2, gradient_clip_val=0.1)

    torch.manual_seed(0)
    plain, teacher = student(), nn.Linear(6, 3)
    torch.manual_seed(1)
    loaders = data()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
    balancer = BilevelLossBalancer(plain, TERMS, optimizer=optimizer, teacher=teacher)
    for _ in range(2):
        for i, batch in enumerate(loaders["train"]):
            (balancer(batch, *loaders["meta"]) / 2).backward()
            if i % 2:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert same(module.student, plain)


def test_a_checkpoint_of_other_terms_is_refused(example, tmp_path):
    train = example(EXAMPLE)["train"]
    train(1, tmp_path)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    saved["balancer"]["terms"] = ["hard", "soft"]
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(
        MetaKDError, match=r"saved with the terms \['hard', 'soft'\] and has \['label', 'teacher'\] here"
    ):
        train(2, tmp_path, tmp_path / "other.ckpt")
