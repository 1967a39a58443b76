"""What the recipes are compared with: losses written out, and one step ahead by plain double backward."""

from collections import OrderedDict

import torch
from torch import nn

CLASSES, SAMPLES = 3, 20


def student(classes=CLASSES):
    layers = OrderedDict(body=nn.Linear(4, 6), act=nn.Tanh(), head=nn.Linear(6, classes))
    return nn.Sequential(layers).double()


def teacher(classes=CLASSES):
    return nn.Linear(4, classes).double().requires_grad_(False)


def train_batch(t, size=6, classes=CLASSES):
    """(inputs, targets, index) of the t-th batch."""
    generator = torch.Generator().manual_seed(t)
    x, y = torch.randn(size, 4, generator=generator).double(), torch.randint(classes, (size,), generator=generator)
    return x, y, torch.randperm(SAMPLES, generator=generator)[:size]


def meta_batch(t, classes=CLASSES):
    """(inputs, targets) of the t-th meta batch."""
    return train_batch(1000 + t, 5, classes)[:2]


def hard(z, y):
    """Cross-entropy of each sample."""
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return -p[torch.arange(len(y)), y].log()


def soft(z, z_teacher, temperature):
    """T^2 KL(teacher || student) of each sample, both softened."""
    p, q = ((a / temperature).exp() for a in (z_teacher, z))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum(1)


def step_ahead(model, loss, lr, moving=""):
    """The outputs of a copy of the model that is one plain SGD step ahead, as a function of its inputs.

    Args:
        model: the student.
        loss: what the step descends, with a graph.
        lr: of the step.
        moving: parameters whose name starts with this move.
    """
    params = {name: p for name, p in model.named_parameters() if name.startswith(moving)}
    slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - lr * slope for (name, p), slope in zip(params.items(), slopes, strict=True)}
    return lambda x: torch.func.functional_call(model, ahead, (x,))


def mlp(parameters, x, activation):
    """A perceptron with sigmoid outputs from its weights and biases, in order."""
    *hidden, weight, bias = parameters
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        x = activation(x @ w.T + b)
    return 1 / (1 + (-(x @ weight.T + bias)).exp())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
