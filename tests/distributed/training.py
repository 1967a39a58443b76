"""Students, batches and balancers of a rank; of one process on the joined batch where the rank is None."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metakd import BilevelLossBalancer, terms, weighting
from tests.distributed.pair import SIZE

PART = 6  # samples a rank


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step, rank, kind=0):
    """The joined batch where rank is None, else the rank's part; each part's first input has a sign of its own."""
    generator = torch.Generator().manual_seed(2 * step + kind)
    inputs = torch.randn(SIZE * PART, 4, generator=generator, dtype=torch.float64)
    inputs[:PART, 0], inputs[PART:, 0] = inputs[:PART, 0].abs(), -inputs[PART:, 0].abs()
    joined = inputs, torch.randint(3, (SIZE * PART,), generator=generator), torch.arange(SIZE * PART)
    return joined if rank is None else tuple(t[PART * rank : PART * (rank + 1)] for t in joined)


def balancer_of(rank, build=plain, optimizer=None, wrap=None, ddp=None, model=None, **options):
    """The student as it is trained, its optimizer, the balancer; weight models begin otherwise on each rank."""
    torch.manual_seed(1)
    student = build().double()
    optimizer = (optimizer or momentum)(student.parameters())
    if rank is not None:
        student = DistributedDataParallel(student, **(ddp or {}))
    elif wrap is not None:
        student = wrap(student)
    torch.manual_seed(100 + (rank or 0))
    options["weighting"] = weighting.LossMLP(2, 2, (3,)).double() if model is None else model()
    two = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    return student, optimizer, BilevelLossBalancer(student, two, optimizer=optimizer, **options)


def momentum(params):
    return torch.optim.SGD(params, lr=0.2, momentum=0.9, weight_decay=1e-2)


def run(rank, balancer, way):
    batches, meta = [batch(5 + t, rank) for t in range(3)], batch(9, rank, 1)
    if way == "call":
        balancer(batches[0], meta)
    elif way == "loss":
        balancer.loss(batches[0])
    elif way == "meta_step":
        balancer.meta_step(batches, meta)
    else:
        next(balancer.windows(batches, [meta], 2))
