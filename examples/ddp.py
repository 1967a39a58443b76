"""Two processes, or more, that train one student and learn one weight model; needs no data.

    torchrun --nproc-per-node 2 examples/ddp.py

It is the usual loop of `DistributedDataParallel`; what is new are the lines that say `balancer`. Four training labels
of ten were thrown dice for, those of a small meta set are right. Each rank draws its own part of both sets; gradients
and hypergradients are those of one process on all parts together.
"""

import argparse
import gc
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # before init_process_group: functions in it take the group as a default, and keep it
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget


def noisy_data(teacher):
    """4,000 training samples of which many have wrong labels, 200 meta samples with right ones, 1,000 for the test."""
    inputs = torch.randn(5200, 20)
    truth = teacher(inputs).argmax(1)
    labels = torch.where(torch.rand(5200) < 0.4, torch.randint(5, (5200,)), truth)
    train, meta, test = inputs.split((4000, 200, 1000))
    return TensorDataset(train, labels[:4000]), (meta, truth[4000:4200]), (test, truth[4200:])


def train(epochs, device, rank, size):
    """Train for some epochs; returns the student, the balancer and the accuracy."""
    torch.manual_seed(0)  # the same data everywhere
    teacher = nn.Linear(20, 5).requires_grad_(False)
    nn.init.normal_(teacher.weight, std=0.4)
    data, meta, (test, truth) = noisy_data(teacher)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler, drop_last=True)
    meta = tuple(part[rank::size].to(device) for part in meta)

    student = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    terms = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher.to(device))

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            inputs, labels = (part.to(device) for part in batch)
            loss = balancer((inputs, labels), meta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            wrong, weights = labels != teacher(inputs).argmax(1), balancer.report.weights[:, 0]
            told = f"right {weights[~wrong].mean():.3f}, wrong {weights[wrong].mean():.3f}"
            print(f"epoch {epoch + 1}: meta loss {balancer.report.meta_loss:.3f}; weight of labels that are {told}")
    with torch.no_grad():
        accuracy = (student.module(test.to(device)).argmax(1).cpu() == truth).float().mean().item()
    return student, balancer, accuracy


def agree(module):
    """Whether the module is, bit for bit, the same on all ranks."""
    mine = nn.utils.parameters_to_vector(module.parameters()).detach()
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    differ = (mine != theirs).sum()
    dist.all_reduce(differ)
    return differ.item() == 0


def run(epochs, device):
    """Train, and tell how well; returns nothing, so that no wrapped student outlives it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    student, balancer, accuracy = train(epochs, device, rank, size)
    same = agree(student), agree(balancer.weighting)
    if rank == 0:
        print(f"test accuracy {100 * accuracy:.1f} %")
        print(f"{size} ranks agree: student {same[0]}, weight model {same[1]}")


def main():
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit("start it as: torchrun --nproc-per-node 2 examples/ddp.py")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        run(args.epochs, device)
    finally:
        gc.collect()  # DistributedDataParallel is part of a reference cycle, and holds the group
        dist.destroy_process_group()  # with nobody holding the group, gloo's threads end here and not at exit


if __name__ == "__main__":
    main()
