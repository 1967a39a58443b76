"""A LightningModule that learns how far to trust each label.

    python examples/lightning_module.py
    python examples/lightning_module.py --resume runs/lightning/epoch=4.ckpt

Four training labels of ten were thrown dice for, those of a small meta set are right. The balancer is built where the
optimizer is, and its state travels in Lightning's checkpoint.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget


class Distilled(lightning.LightningModule):
    """A student that learns from labels and from a teacher; batches are {"train": ..., "meta": ...}."""

    def __init__(self, teacher):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
        self.teacher, self.resumed = teacher.requires_grad_(False), None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        terms = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
        self.balancer = BilevelLossBalancer(self.student, terms, optimizer=optimizer, teacher=self.teacher)
        if self.resumed is not None:
            self.balancer.load_state_dict(self.resumed)
        return optimizer

    def training_step(self, batch, batch_idx):
        return self.balancer(batch["train"], batch["meta"])

    def on_save_checkpoint(self, checkpoint):
        checkpoint["balancer"] = self.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.resumed = checkpoint["balancer"]  # Lightning loads first and configures the optimizers then


def noisy_data(teacher):
    """1,000 training samples of which many have wrong labels, 100 meta samples with right ones, 1,000 for the test."""
    inputs = torch.randn(2100, 20)
    truth = teacher(inputs).argmax(1)
    labels = torch.where(torch.rand(1000) < 0.4, torch.randint(5, (1000,)), truth[:1000])
    return (inputs[:1000], labels), (inputs[1000:1100], truth[1000:1100]), (inputs[1100:], truth[1100:])


def train(epochs, output, resume=None):
    """Train for some epochs, or from a checkpoint on; returns the module and prints what was learned."""
    lightning.seed_everything(0)
    teacher = nn.Linear(20, 5)
    nn.init.normal_(teacher.weight, std=0.4)
    data, meta, test = noisy_data(teacher)
    loaders = {"train": DataLoader(TensorDataset(*data), 50), "meta": DataLoader(TensorDataset(*meta), 100)}
    module, checkpoints = Distilled(teacher), ModelCheckpoint(output, "{epoch}", save_top_k=-1)
    lightning.Trainer(max_epochs=epochs, callbacks=[checkpoints], logger=False).fit(module, loaders, ckpt_path=resume)

    wrong = data[1] != teacher(data[0]).argmax(1)
    weights = module.balancer.to(module.device).weights(data)  # Lightning has moved the module back to the CPU
    for term, right, other in zip(module.balancer.terms, weights[~wrong].mean(0), weights[wrong].mean(0), strict=True):
        print(f"weight of the {term}: {right:.2f} where the label is right, {other:.2f} where it is wrong")
    print(f"test accuracy: {(module.student(test[0]).argmax(1) == test[1]).float().mean():.1%}")
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn, in a LightningModule, how far to trust each label.")
    parser.add_argument("--resume", type=Path, help="a checkpoint under runs/lightning")
    train(10, Path("runs/lightning"), parser.parse_args().resume)
