"""One weight a group: what a balancer learns with it."""

import pytest
import torch
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, terms, weighting

SOURCE = torch.tensor([2, 0, 2, 2, 0, 1])


def batch_of(seed, columns=None):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    return Batch(inputs, torch.randint(3, (6,), generator=generator), index=torch.arange(6), columns=columns)


def built(table):
    torch.manual_seed(0)
    student, table = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), table.double()
    pair = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    moved_by = torch.optim.SGD(table.parameters(), lr=1.0)
    return BilevelLossBalancer(student, pair, optimizer=optimizer, weighting=table, weighting_optimizer=moved_by)


def test_a_groups_gradient_is_the_sum_of_its_samples_gradients():
    by_sample, by_source = built(weighting.SampleTable(6, 2)), built(weighting.GroupTable("source", 4, 2))
    for balancer in (by_sample, by_source):
        balancer(batch_of(1, {"source": SOURCE}), batch_of(2))
    wanted = torch.zeros(4, 2, dtype=torch.float64).index_add_(0, SOURCE, by_sample.weighting.free.grad)
    torch.testing.assert_close(by_source.weighting.free.grad, wanted, rtol=1e-12, atol=1e-15)
    assert bool(wanted[:3].all()) and not wanted[3].any()


def test_its_hypergradient_is_right():
    check_hypergradient(built(weighting.GroupTable("source", 4, 2)), [batch_of(1, {"source": SOURCE})], batch_of(2))


def test_a_batch_without_the_column_changes_nothing():
    balancer = built(weighting.GroupTable("source", 4, 2))
    balancer(batch_of(1, {"source": SOURCE}), batch_of(2))
    before = [p.detach().clone() for p in (*balancer.student.parameters(), *balancer.weighting.parameters())]
    for columns, words in (
        (None, r"GroupTable needs batch.columns\['source'\], which is None"),
        ({"source": SOURCE + 2}, r"batch.columns\['source'\] 4 is out of range \[0, 4\)"),
        ({"source": SOURCE[:5]}, r"the column 'source' of the batch has 5 values for 6 samples"),
    ):
        with pytest.raises(MetaKDError, match=words):
            balancer(batch_of(1, columns), batch_of(2))
        after = [*balancer.student.parameters(), *balancer.weighting.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_weights_of_all_groups():
    table = weighting.GroupTable("source", 4, 2, init=0.5, output="sigmoid")
    nn.init.normal_(table.free)
    found = table.all_weights()
    assert not found.requires_grad
    every = Batch(None, columns={"source": torch.arange(4)})
    assert torch.equal(found, table(torch.zeros(4, 1), every))
