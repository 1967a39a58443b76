"""Mixed precision: bfloat16 on a CPU, float16 with a gradient scaler on CUDA.

    python examples/mixed_precision.py
    python examples/mixed_precision.py --precision float16

Four training labels of ten were thrown dice for, those of a small meta set are right. The balancer is called where the
model was called, inside of autocast; the backward pass stays outside.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget


def noisy_digits(device):
    """1,000 training samples of which many have wrong labels, 200 meta samples with right ones, 597 for the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    inputs, truth = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    labels = torch.where(torch.rand(1000) < 0.4, torch.randint(10, (1000,)), truth[:1000])
    parts = (inputs[:1000], labels), (inputs[1000:1200], truth[1000:1200]), (inputs[1200:], truth[1200:])
    return [(x.to(device), y.to(device)) for x, y in parts], (labels != truth[:1000]).to(device)


def fitted(model, inputs, targets):
    """The teacher: a model that has seen the meta set alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def train(device, precision, epochs=20):
    """Returns the student and the balancer; prints what was learned."""
    torch.manual_seed(0)
    (data, meta, test), wrong = noisy_digits(device)
    teacher = fitted(nn.Linear(64, 10).to(device), *meta)
    student = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    terms = {"label": CrossEntropy(), "teacher": SoftTarget(temperature=4.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher)
    scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)

    for epoch in range(1, epochs + 1):
        for batch in DataLoader(TensorDataset(*data), batch_size=50, shuffle=True):
            with torch.autocast(device, precision):
                loss = balancer(batch, meta)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if balancer.report.skipped is not None:
                print(f"no hypergradient: {balancer.report.skipped}")
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, meta loss {balancer.report.meta_loss.item():.3f}")

    weights = balancer.weights(data)
    for term, right, other in zip(terms, weights[~wrong].mean(0), weights[wrong].mean(0), strict=True):
        print(f"weight of the {term}: {right:.2f} where the label is right, {other:.2f} where it is wrong")
    with torch.no_grad():
        accuracy = (student.eval()(test[0]).argmax(1) == test[1]).float().mean()
    print(f"test accuracy: {accuracy:.1%}")
    return student, balancer


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Learn how far to trust each label, in mixed precision.")
    parser.add_argument("--precision", choices=["bfloat16", "float16"], default="float16" if cuda else "bfloat16")
    arguments = parser.parse_args()
    train("cuda" if cuda else "cpu", getattr(torch, arguments.precision))
