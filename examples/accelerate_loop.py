"""A training loop of Hugging Face Accelerate that learns how far to trust each label.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --resume runs/accelerate/epoch-5

Four training labels of ten were thrown dice for, those of a small meta set are right. The loop is Accelerate's own; the
lines that say `balancer` are what is new.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget


def noisy_data(teacher):
    """1,000 training samples of which many have wrong labels, 100 meta samples with right ones, 1,000 for the test."""
    inputs = torch.randn(2100, 20)
    truth = teacher(inputs).argmax(1)
    labels = torch.where(torch.rand(1000) < 0.4, torch.randint(5, (1000,)), truth[:1000])
    return (inputs[:1000], labels), (inputs[1000:1100], truth[1000:1100]), (inputs[1100:], truth[1100:])


def train(epochs, output, resume=None):
    """Train for some epochs, or from a checkpoint on; returns student and balancer and prints what was learned."""
    accelerator = Accelerator()
    set_seed(0)
    teacher = nn.Linear(20, 5).to(accelerator.device)
    nn.init.normal_(teacher.weight, std=0.4)
    data, meta, test = (send_to_device(part, accelerator.device) for part in noisy_data(teacher))
    student = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(*data), batch_size=50, shuffle=True)

    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    terms = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher)
    accelerator.register_for_checkpointing(balancer)
    first = 1
    if resume is not None:
        accelerator.load_state(resume)
        first += int(resume.name.removeprefix("epoch-"))

    for epoch in range(first, epochs + 1):
        for batch in loader:
            loss = balancer(batch, meta)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.save_state(output / f"epoch-{epoch}")
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, meta loss {balancer.report.meta_loss.item():.3f}")

    wrong = data[1] != teacher(data[0]).argmax(1)
    weights = balancer.weights(data)
    for term, right, other in zip(terms, weights[~wrong].mean(0), weights[wrong].mean(0), strict=True):
        accelerator.print(f"weight of the {term}: {right:.2f} where the label is right, {other:.2f} where it is wrong")
    accuracy = (student(test[0]).argmax(1) == test[1]).float().mean()
    accelerator.print(f"test accuracy: {accuracy:.1%}")
    return student, balancer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn, in a loop of Accelerate, how far to trust each label.")
    parser.add_argument("--resume", type=Path, help="a checkpoint under runs/accelerate")
    train(10, Path("runs/accelerate"), parser.parse_args().resume)
