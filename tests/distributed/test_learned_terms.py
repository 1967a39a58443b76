"""The parameters of terms that two processes share."""

import torch
from torch.nn.parallel import DistributedDataParallel

from metakd import BilevelLossBalancer, weighting
from tests.learned_terms.by_hand import LR, Shifted, data, student
from tests.test_no_trace import assert_same


def of_rank(rank):
    torch.manual_seed(1)
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    wrapped = model if rank is None else DistributedDataParallel(model)
    torch.manual_seed(rank or 0)
    term = Shifted()
    term.offset.data += torch.randn(3).double() if rank else 0
    table = weighting.TermScalars(1).double()
    balancer = BilevelLossBalancer(wrapped, {"shifted": term}, optimizer=optimizer, weighting=table)
    for t in range(3):
        (x, y), (mx, my) = data(t), data(9)
        part = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
        loss = balancer((x[part], y[part]), (mx[part], my[part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in (*term.parameters(), *table.parameters(), *model.parameters())]


def test_processes_share_the_terms_parameters(pair):
    zero, one = pair(of_rank)
    assert_same(zero, one)
    for found, expected in zip(zero, of_rank(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
