"""Students of `fully_shard`, and the same student in one process on the joined batch."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from metakd import BilevelLossBalancer, terms, weighting
from tests.distributed.pair import SIZE
from tests.distributed.training import batch, momentum


class Block(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        self.inner, self.outer, self.again = nn.Linear(5, 3), nn.Linear(3, 5), again

    def forward(self, x):
        return x + (checkpoint(self._body, x, use_reentrant=False) if self.again else self._body(x))

    def _body(self, x):
        return self.outer(self.inner(x).tanh())


class Stack(nn.Module):
    """Parts of odd sizes, a parameter that one process has nothing of, and a weight in two places."""

    def __init__(self, again=False):
        super().__init__()
        self.enter, self.blocks = nn.Linear(4, 5), nn.ModuleList([Block(again), Block(again)])
        self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(5, 3)
        self.other = nn.Linear(5, 3)
        self.other.weight = self.head.weight

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.scale * self.head(x) + self.other(x.sin())


def frozen():
    stack = Stack()
    stack.enter.requires_grad_(False)
    stack.blocks[0].inner.weight.requires_grad_(False)
    return stack


def recomputing():
    return Stack(again=True)


def shard(student, **options):
    mesh = init_device_mesh("cpu", (SIZE,))
    for block in student.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(student, mesh=mesh, **options)
    return student


def balancer_of(rank, build=Stack, optimizer=momentum, fsdp=None, model=None, **options):
    """The student, its optimizer and the balancer; weight models begin otherwise on each rank."""
    torch.manual_seed(1)
    student = build().double()
    if rank is not None:
        shard(student, **(fsdp or {}))
    optimizer = optimizer([p for p in student.parameters() if p.requires_grad])
    torch.manual_seed(100 + (rank or 0))
    options["weighting"] = weighting.LossMLP(2, 2, (3,)).double() if model is None else model()
    two = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    return student, optimizer, BilevelLossBalancer(student, two, optimizer=optimizer, **options)


def whole(tensor):
    """A sharded tensor in one piece; others as they are. All ranks call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors):
    return [None if t is None else whole(t) for t in tensors]


def bits(student):
    """Copies of this rank's parts."""
    return [p.detach().to_local().clone() for p in student.parameters()]


def trained(rank, ahead=0, steps=4, **setting):
    """All that is learned in a few steps: by one process where rank is None."""
    student, optimizer, balancer = balancer_of(rank, **setting)
    seen = []
    for step in range(steps):
        if ahead:
            seen.append(balancer.meta_step([batch(7 * step + t, rank) for t in range(ahead)], batch(step, rank, 1)))
        loss = balancer(batch(step, rank), None if ahead else batch(step, rank, 1))
        optimizer.zero_grad()
        loss.backward()
        seen.append(balancer.report)
        optimizer.step()
    return {
        "student": wholes(student.parameters()),
        "gradients": wholes(p.grad for p in student.parameters()),
        "weight model": [p.detach() for p in balancer.weighting.parameters()],
        "hypergradient": [p.grad for p in balancer.weighting.parameters()],
        "of all": [(report.meta_loss, report.hypergradient_norm) for report in seen],
        "rows": [(report.losses, report.weights, report.influence) for report in seen],
    }
