"""`balancer.windows`: the loop with K inner steps is a `meta_step` before each K real ones."""

import itertools

import pytest
import torch
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError, estimators, terms, weighting


def build(teacher=None):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    return BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=optimizer,
        weighting=weighting.LossMLP(2, 2, hidden=(3,)),
        teacher=teacher,
        inner="mirror",
        estimator=estimators.Adjoint(),
    )


def loader(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(number)
    ]


def real_step(balancer, batch):
    loss = balancer.loss(batch)
    balancer.optimizer.zero_grad()
    loss.backward()
    balancer.optimizer.step()


def everything(balancer):
    return [*balancer.student.state_dict().values(), *balancer.weighting.state_dict().values()]


@pytest.mark.parametrize(("number", "size"), [(6, 2), (6, 3), (7, 3), (2, 5), (3, 1)])
def test_windows_are_meta_steps_between_real_steps(number, size):
    written, walked = build(), build()
    batches, meta_batches = loader(number), loader(number, seed=1)
    torch.manual_seed(3)
    meta = iter(meta_batches)
    for i in range(0, number, size):
        written.meta_step(batches[i : i + size], next(meta))
        for batch in batches[i : i + size]:
            real_step(written, batch)
    torch.manual_seed(3)
    meta = iter(meta_batches)
    seen = []
    for batch in walked.windows(batches, meta, size):
        seen.append(batch)
        real_step(walked, batch)
    assert [b.inputs for b in seen] == [x for x, _ in batches]
    assert len(list(meta)) == number - -(-number // size)
    for a, b in zip(everything(written), everything(walked), strict=True):
        assert torch.equal(a, b)


def test_the_virtual_steps_are_the_real_ones():
    """With the weight model frozen by lr = 0 the lookahead ends where the student then is."""
    balancer = build()
    balancer.weighting_optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    meta_inputs, meta_targets = loader(1, seed=1)[0]
    walk = balancer.windows(loader(3), iter([(meta_inputs, meta_targets)]), 3)
    torch.manual_seed(5)
    first = next(walk)
    meta_loss = balancer.report.meta_loss
    for batch in [first, *walk]:
        real_step(balancer, batch)
    # The meta pass goes on with the generator where the last step left it, and so does this one.
    found = nn.functional.cross_entropy(balancer.student(meta_inputs), meta_targets)
    torch.testing.assert_close(found, meta_loss)


def test_the_teacher_runs_once_a_batch():
    calls = []

    class Teacher(nn.Linear):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    balancer = build(Teacher(4, 3))
    for batch in balancer.windows(loader(4), itertools.cycle(loader(1, seed=1)), 2):
        assert isinstance(batch, Batch) and batch.teacher.shape == (5, 3)
        real_step(balancer, batch)
    assert len(calls) == 4


def test_an_exhausted_meta_loader_is_named():
    balancer = build()
    walk = balancer.windows(loader(4), iter(loader(1)), 2)
    next(walk)
    next(walk)
    before = [t.clone() for t in everything(balancer)]
    with pytest.raises(MetaKDError, match="meta batches ended before the training batches"):
        next(walk)
    for a, b in zip(before, everything(balancer), strict=True):
        assert torch.equal(a, b)


def test_a_meta_loader_is_begun_anew():
    balancer, meta = build(), loader(2, seed=1)
    seen = []
    step = balancer.meta_step
    balancer.meta_step = lambda window, meta_batch: seen.append(meta_batch[0]) or step(window, meta_batch)
    list(balancer.windows(loader(6), meta, 2))
    assert [id(x) for x in seen] == [id(meta[i][0]) for i in (0, 1, 0)]
    with pytest.raises(MetaKDError, match="at least one batch"):
        next(build().windows(loader(2), [], 1))


@pytest.mark.parametrize("size", [0, 1.5, None])
def test_a_size_is_a_positive_number(size):
    with pytest.raises(MetaKDError, match=r"size is .*, but must be an integer of at least 1"):
        next(build().windows(loader(2), iter(loader(1)), size))
