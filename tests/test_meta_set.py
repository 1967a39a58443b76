"""Meta images among the training images: joined batches, who judges whom, and the weights of the meta images."""

import copy

import pytest
import torch
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, meta_in_training, terms, weighting
from metakd.meta_set import joined
from metakd.weighting.base import default_optimizer

X, Y, SOURCE = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 1, 1])
META = torch.randn(2, 3), torch.tensor([2, 1])


def test_joined_batches_hold_both():
    batch = joined(
        Batch(X, Y, index=torch.arange(4), columns={"source": SOURCE}), Batch(*META, columns={"kind": Y[:2]})
    )
    assert torch.equal(batch.inputs, torch.cat([X, META[0]])) and torch.equal(batch.targets, torch.cat([Y, META[1]]))
    assert batch.index.tolist() == [0, 1, 2, 3, -1, -1] and batch.teacher is None and batch.size is None
    columns = {name: values.tolist() for name, values in batch.columns.items()}
    assert columns == {
        "source": [3, 0, 1, 1, -1, -1],
        "kind": [-1, -1, -1, -1, 0, 1],
        "from_meta": [0, 0, 0, 0, 1, 1],
    }
    nested = joined(
        Batch({"a": X, "b": (X, X)}, Y, X, size=4), Batch({"a": META[0], "b": (META[0], META[0])}, *META[::-1])
    )
    assert nested.inputs["b"][1].shape == (6, 3) and nested.teacher.shape == (6, 3) and nested.size == 6
    assert joined(Batch(X, Y, [X, X]), Batch(*META, [META[0]] * 2)).teacher[1].shape == (6, 3)


@pytest.mark.parametrize(
    ("batch", "meta", "words"),
    [
        (Batch(X, Y), Batch(META[0][:, :2], META[1]), r"the inputs of a training batch \(torch.float32 \(4, 3\)\) and"),
        (Batch(X, Y), Batch(META[0]), r"the targets of .* \(None\) cannot be joined"),
        (Batch(X, Y, X), Batch(*META), r"the teacher's outputs of a training batch .*pass batch_fn="),
        (Batch({"a": X}, Y), Batch({"b": META[0]}, META[1]), r"the inputs of a training batch \(\{a: "),
        (Batch([X, X], Y), Batch([META[0], META[0][:, :1]], META[1]), r"the inputs\[1\] of"),
    ],
)
def test_batches_that_cannot_be_joined(batch, meta, words):
    with pytest.raises(MetaKDError, match=words):
        joined(batch, meta)


def numbered(*rows):
    return [(torch.full((1, 3), float(n)), torch.tensor([0])) for n in rows]


def met(train, meta):
    return [(int(b.inputs[-1, 0]), int(m[0][0, 0])) for b, m in meta_in_training(train, meta)]


def test_one_meta_loader_judges_by_another_batch():
    assert met(numbered(*range(4)), numbered(10, 11, 12)) == [(10, 11), (12, 10), (11, 12), (10, 11)]


def test_parts_take_turns():
    found = met(numbered(*range(4)), (numbered(10, 11), numbered(20, 21)))
    assert found == [(10, 20), (21, 11), (10, 20), (21, 11)]


def test_what_ends_or_is_empty():
    with pytest.raises(MetaKDError, match="empty tuple"):
        met(numbered(1), ())
    with pytest.raises(MetaKDError, match="at least one batch"):
        met(numbered(1), [])
    assert met([], numbered(1)) == []


def built(model, weight=0.3):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    pair = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    pinned = weighting.Pinned(model, weight).double()
    return BilevelLossBalancer(student, pair, optimizer=optimizer, weighting=pinned)


def batches():
    train = Batch(X.double(), Y, index=torch.arange(4), columns={"source": SOURCE})
    return next(meta_in_training([train], [Batch(META[0].double(), META[1])]))


@pytest.mark.parametrize(
    "model", [weighting.GroupTable("source", 4, 2), weighting.SampleTable(4, 2), weighting.LossMLP(2, 2)]
)
def test_meta_images_have_the_given_weight_and_no_part_in_the_hypergradient(model):
    balancer, (batch, meta_batch) = built(copy.deepcopy(model)), batches()
    before = balancer.weights(batch)
    assert bool((before[4:] == 0.3).all()) and not bool((before[:4] == 0.3).any())
    balancer(batch, meta_batch)
    influence, seen = balancer.report.influence, [p.grad.clone() for p in balancer.weighting.parameters()]
    alone = balancer.weighting.model
    fresh = built(copy.deepcopy(model)).weighting.model
    features = balancer.features(balancer.report.losses, None, batch)
    train = batch._replace(index=batch.index[:4], columns={"source": SOURCE})
    gradient = torch.autograd.grad(fresh(features[:4], train), list(fresh.parameters()), influence[:4] / 6)
    assert type(alone) is type(fresh)
    torch.testing.assert_close(seen, list(gradient))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


def test_without_it_a_table_refuses_meta_images():
    balancer, (batch, _) = built(weighting.LossMLP(2, 2)), batches()
    balancer.weighting.model = weighting.GroupTable("source", 4, 2).double()
    balancer.weighting.column = "another"
    with pytest.raises(MetaKDError, match=r"batch.columns\['source'\] -1 is out of range"):
        balancer.weights(batch)


def test_batches_without_the_column_have_the_models_weights():
    pinned = weighting.Pinned(weighting.GroupTable("source", 4, 2), 0.3)
    assert bool((pinned(torch.zeros(4, 2), Batch(X, columns={"source": SOURCE})) == 1).all())
    assert default_optimizer(pinned).defaults["lr"] == 0.1


@pytest.mark.parametrize(("model", "weight"), [("table", 1.0), (nn.Linear(1, 1), float("nan")), (nn.Linear(1, 1), "1")])
def test_what_cannot_be_pinned(model, weight):
    with pytest.raises(MetaKDError, match=r"Pinned wraps a weight model|must be a finite number"):
        weighting.Pinned(model, weight)
