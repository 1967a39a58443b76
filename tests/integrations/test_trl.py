"""TRL and PEFT: distillation token by token into LoRA's adapters."""

import pytest
import torch
import torch.nn.functional as F

from metakd import Batch

pytest.importorskip("trl")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

EXAMPLE = "trl_distillation.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL uses names that transformers deprecates


@pytest.fixture
def made(example, tmp_path):
    found = example(EXAMPLE)
    transformers.set_seed(0)
    return found, found["distil"](tmp_path / "out", found["model_of"](16), found["model_of"](32), epochs=1, number=96)


def test_only_adapters_learn_and_all_of_them(made):
    _, trainer = made
    student = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.grad is None for name, p in student.named_parameters() if name not in trained)
    assert trainer.balancer.state_dict()["calls"] == 3 and trainer.balancer.report.influence.shape == (32, 2)
    assert any("lora_B" in name and bool(p.any()) for name, p in student.named_parameters())


def test_losses_and_influence_are_those_of_plain_torch(made):
    """In float64: cross-entropies, divergences by token, and their derivatives along the lookahead's step."""
    _, trainer = made
    balancer, student, teacher = trainer.balancer, trainer.balancer.student.double(), trainer.teacher.double()
    balancer.to(torch.float64)
    trainer.optimizer.optimizer.param_groups[0]["lr"] = rate = 0.1
    trainer.optimizer.optimizer.param_groups[1:] = []
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    params = {name: p for name, p in student.named_parameters() if p.requires_grad}
    trainer.optimizer.optimizer.param_groups[0]["params"] = list(params.values())

    def logits(of, inputs):
        return of(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]

    def text(inputs):
        return F.cross_entropy(logits(student, inputs).mT, inputs["labels"][:, 1:], reduction="none").mean(1)

    def losses():
        with torch.no_grad():
            t = F.softmax(logits(teacher, batch) / 2, -1)
        z = F.log_softmax(logits(student, batch) / 2, -1)
        return torch.stack([text(batch), 4 * (t * (t.log() - z)).sum(-1).mean(1)], 1)

    weights, found = balancer.weights(dict(batch)), losses()
    g = torch.autograd.grad((weights * found).sum() / 4, list(params.values()), retain_graph=True)
    with torch.no_grad():
        for p, d in zip(params.values(), g, strict=True):
            p -= rate * d
    v = torch.autograd.grad(text(trainer.meta_batch).mean(), list(params.values()))
    with torch.no_grad():
        for p, d in zip(params.values(), g, strict=True):
            p += rate * d
    wanted = torch.zeros(4, 2, dtype=torch.float64)
    for i in range(4):
        for k in range(2):
            own = torch.autograd.grad(losses()[i, k], list(params.values()))
            wanted[i, k] = -rate * sum((a * b).sum() for a, b in zip(own, v, strict=True))
    balancer(dict(batch), trainer.meta_batch)
    torch.testing.assert_close(balancer.report.losses, found.detach())
    rounding = 1e-6 * wanted.abs().max()  # Llama's normalisation computes in float32
    torch.testing.assert_close(balancer.report.influence, wanted, rtol=1e-6, atol=float(rounding))


def test_padding_counts_for_nothing(made):
    found, _ = made
    z = torch.randn(2, 5, 13)
    labels = torch.randint(11, (2, 5))
    labels[1, 3:] = -100
    padded = found["TEXT"](z, Batch(None, labels))
    torch.testing.assert_close(padded[1], found["TEXT"](z[1:, :3], Batch(None, labels[1:, :3]))[0])


@pytest.mark.slow
def test_the_example_learns(run_example):
    said = run_example(EXAMPLE).splitlines()
    assert float(said[-1].split()[2]) < 2.0
