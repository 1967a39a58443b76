"""One-step problems of modules whose inner loss is a weighted mean of two losses, as a balancer's is."""

import torch
import torch.nn.functional as F
import torchopt
from torch import nn
from torch.func import functional_call

from metakd._basics.rng import RngState
from metakd.estimators import Memory, Problem, WeightedLosses
from metakd.inner import repaired

CLASSES = 5


def hard(z, y):
    return F.cross_entropy(z, y, reduction="none")


def soft(z, y):
    return (z.log_softmax(1) * -(y[:, None] + torch.arange(CLASSES)).sin().softmax(1)).sum(1)


def weighted_problem(module, x, y, terms=(hard, soft), *, autocast=False, memory=None, lr=0.1):
    """A problem in the weights (B, M); each pass has the same buffers and random numbers."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    rng = RngState.capture([x.device])
    names = [getattr(term, "__name__", str(k)) for k, term in enumerate(terms)]

    def outputs(params, inputs):
        rng.restore()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return functional_call(module, {**params, **{n: b.clone() for n, b in buffers.items()}}, (inputs,))

    def losses(params, batch):
        z = outputs(params, x)
        return torch.stack([term(z.to(x.dtype) if autocast else z, y) for term in terms], 1)

    def weights(meta, batch):
        return meta["weights"].sigmoid()

    def inner(params, meta, batch):
        return (weights(meta, batch) * losses(params, batch)).sum() / len(x)

    params = {name: p.detach() for name, p in module.named_parameters()}
    sgd = repaired(torchopt.sgd(lr=lr))
    return Problem(
        inner,
        [lambda p, m: hard(outputs(p, x.flip(0) * 0.7), y.roll(1)).mean()],
        params,
        {"weights": torch.linspace(-1, 1, len(x) * len(terms), dtype=x.dtype).view(len(x), -1)},
        [0],
        lambda m: sgd,
        sgd.init(params),
        memory=Memory() if memory is None else memory,
        weighted=WeightedLosses(losses, weights, names),
    )


def data(size=6, features=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, features, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def mlp(*middle, width=8, features=4, dtype=torch.float64):
    """Linear, tanh, the middle, linear."""
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), *middle, nn.Linear(width, CLASSES)).to(dtype)
