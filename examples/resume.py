"""A training loop that may be stopped at any moment, and goes on to the very same numbers.

    python examples/resume.py      # press Ctrl-C, or kill it
    python examples/resume.py      # goes on from its last checkpoint

The generators are saved with everything else, and the batches of an epoch depend on its number alone, so that they can
be drawn again and those that are behind us skipped. The last line is the same however often it was stopped.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer
from metakd.longtail import Checkpoint
from metakd.terms import CrossEntropy, SoftTarget


def shuffled(data, size, epoch):
    """A loader whose order depends on the epoch alone."""
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(epoch))


def train(steps, save_every, path):
    """Train from where the checkpoint is up to a number of steps; returns the student."""
    torch.manual_seed(0)
    teacher = nn.Linear(20, 5)
    inputs = torch.randn(700, 20)
    targets = teacher(inputs).argmax(1)
    targets[:200] = torch.randint(5, (200,))  # wrong labels, among those for training alone
    data, meta = TensorDataset(inputs[:600], targets[:600]), TensorDataset(inputs[600:], targets[600:])

    student = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    terms = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher, accumulate=3)

    parts = {"student": student, "optimizer": optimizer, "scheduler": scheduler, "balancer": balancer}
    checkpoint = Checkpoint(path, {"steps": steps}, parts)
    history = checkpoint.load()  # one entry for each step that is behind us
    print(f"{len(history)} of {steps} steps are done", flush=True)
    per_epoch = len(shuffled(data, 50, 0))
    while len(history) < steps:
        epoch, done = divmod(len(history), per_epoch)
        batches = zip(shuffled(data, 50, epoch), itertools.cycle(shuffled(meta, 25, epoch)), strict=False)
        for batch, meta_batch in itertools.islice(batches, done, steps - epoch * per_epoch):
            loss = balancer(batch, meta_batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            history.append(loss.item())
            if len(history) % save_every == 0 or len(history) == steps:
                checkpoint.save(history)
    return student


def main():
    """Read the command line, train, and print a number in which every bit of the student counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/resume.pt"))
    args = parser.parse_args()
    student = train(args.steps, args.save_every, args.output)
    print("sum of all parameters:", sum(p.double().sum().item() for p in student.parameters()).hex())


if __name__ == "__main__":
    main()
