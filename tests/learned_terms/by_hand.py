"""A balancer with a term that learns, and its hypergradient by double backward through SGD steps, written out."""

import torch
import torch.nn.functional as F
from torch import nn

from metakd import BilevelLossBalancer, weighting
from metakd.terms import CrossEntropy

LR, CLASSES = 0.3, 3


class Shifted(nn.Module):
    """Cross-entropy of scaled and shifted logits."""

    uses_teacher = False

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]).double())
        self.log_scale = nn.Parameter(torch.tensor([0.1, 0.2, -0.4]).double())

    def forward(self, outputs, batch):
        return F.cross_entropy(outputs * self.log_scale.exp() + self.offset, batch.targets, reduction="none")


class Twice:
    """A meta loss that uses a term itself."""

    def __init__(self, term):
        self.term = term

    def __call__(self, outputs, batch):
        return self.term(outputs, batch) ** 2 + F.cross_entropy(outputs, batch.targets, reduction="none")


def student():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def data(t, size=6):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(size, 4, generator=generator).double(), torch.randint(CLASSES, (size,), generator=generator)


def table():
    found = weighting.ClassTable(CLASSES, 2, init=0.7, output="softplus").double()
    found.free.data += torch.arange(6).view(3, 2) / 10
    return found


def balancer_of(*, frozen=False, direct=False, lr=0.0, **options):
    """Student, term and balancer; the meta-parameters stand still at a rate of 0."""
    torch.manual_seed(1)
    model, term, weights = student(), Shifted(), table()
    weights.requires_grad_(not frozen)
    params = [*weights.parameters(), *term.parameters()]
    options.setdefault("weighting_optimizer", torch.optim.SGD(params, lr=lr))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    meta_loss = Twice(term) if direct else None
    terms = {"shifted": term, "hard": CrossEntropy()}
    found = BilevelLossBalancer(model, terms, optimizer=optimizer, weighting=weights, meta_loss=meta_loss, **options)
    return model, term, found


def by_hand(model, term, balancer, batches, meta, *, direct=False):
    """The hypergradient by name, by autograd through the steps."""
    free = balancer.weighting.free
    meta_params = {"terms.shifted.offset": term.offset, "terms.shifted.log_scale": term.log_scale}
    meta_params |= {"free": free} if free.requires_grad else {}

    def shifted(z, y):
        return F.cross_entropy(z * term.log_scale.exp() + term.offset, y, reduction="none")

    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    for x, y in batches:
        z = torch.func.functional_call(model, theta, (x,))
        losses = torch.stack([shifted(z, y), F.cross_entropy(z, y, reduction="none")], 1)
        inner = (F.softplus(free)[y] * losses).sum() / len(y)
        slopes = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta = {name: p - LR * g for (name, p), g in zip(theta.items(), slopes, strict=True)}
    x, y = meta
    z = torch.func.functional_call(model, theta, (x,))
    outer = F.cross_entropy(z, y, reduction="none") + (shifted(z, y) ** 2 if direct else 0.0)
    found = torch.autograd.grad(outer.mean(), list(meta_params.values()))
    return dict(zip(meta_params, found, strict=True))


def grads(term, balancer):
    found = {"terms.shifted.offset": term.offset.grad, "terms.shifted.log_scale": term.log_scale.grad}
    free = balancer.weighting.free
    return found | ({"free": free.grad} if free.requires_grad else {})
