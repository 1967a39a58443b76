"""Batches whose size nothing plain tells: detection, CTC, packed sequences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from metakd import Batch, MetaKDError, check_hypergradient, estimators
from tests.cases.real_optimizers import MODES, Case, assert_right, balanced, plain, seeded, sgd


class Detector(nn.Module):
    """A box for each image, which may come as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, images: Any) -> Tensor:
        if isinstance(images, list):
            images = torch.stack([image.mean(0) for image in images])
        return self.net(images)


def boxes(outputs: Tensor, batch: Batch) -> Tensor:
    return torch.stack([(z - t["boxes"]).square().mean() for z, t in zip(outputs, batch.targets, strict=True)])


def areas(outputs: Tensor, batch: Batch) -> Tensor:
    return torch.stack([z.square().sum() * len(t["labels"]) for z, t in zip(outputs, batch.targets, strict=True)])


def detection(size: int, seed: int, *, listed: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    images: Any = [normal(2 + i, 4) for i in range(size)] if listed else normal(size, 4)
    counts = [1 + (i + seed) % 3 for i in range(size)]
    targets = [{"boxes": normal(n, 4), "labels": torch.ones(n, dtype=torch.long)} for n in counts]
    return Batch((images,) if listed else images, targets)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("sizes", [(5, 6), (1, 2), (3, 1)])
def test_detection(listed, sizes):
    batch, meta_batch = (detection(size, seed, listed=listed) for seed, size in enumerate(sizes))

    def case() -> Case:
        return sgd(seeded(Detector), terms={"boxes": boxes, "areas": areas}, meta_loss=boxes)

    for estimator in MODES:
        balancer = assert_right(case, given=([batch], meta_batch), estimator=estimator)
        assert balancer.report.weights.shape == (sizes[0], 2)
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    item, meta_item = ((b.inputs, b.targets) for b in (batch, meta_batch))
    balancer = balanced(case())
    balancer(item, meta_item)  # as the loader yields it
    assert balancer.report.weights.shape == (sizes[0], 2)


def test_a_list_of_images_is_told_how_to_be_one_argument():
    batch, meta_batch = (detection(5, seed, listed=True) for seed in range(2))
    balancer = plain(seeded(Detector), {"boxes": boxes}, meta_loss=boxes)
    with pytest.raises(MetaKDError, match=r"elements of a list are positional arguments.*Batch\(inputs=\(elements,\)"):
        balancer((batch.inputs[0], batch.targets), (meta_batch.inputs[0], meta_batch.targets))


class Reader(nn.Module):
    """Logits of four symbols at each of six times, (B, 6, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 6, 4)


def ctc(outputs: Tensor, batch: Batch) -> Tensor:
    labels, lengths = batch.targets
    times = torch.full((len(outputs),), 6)
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), labels, times, lengths, reduction="none")


def weight(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs.square().mean((1, 2))


def symbols(size: int, seed: int, *, joined: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (size,), generator=generator)
    labels = torch.randint(1, 4, (size, 3), generator=generator)
    if joined:
        labels = torch.cat([row[:n] for row, n in zip(labels, lengths.tolist(), strict=True)])
    return Batch(torch.randn(size, 4, dtype=torch.float64, generator=generator), (labels, lengths))


def reader() -> Case:
    return sgd(seeded(Reader), terms={"ctc": ctc, "weight": weight}, meta_loss=ctc)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("sizes", [(5, 6), (2, 3)])
def test_ctc(joined, sizes):
    batch, meta_batch = (symbols(size, seed, joined=joined) for seed, size in enumerate(sizes))
    differences = estimators.FiniteDifference()
    balancer = assert_right(reader, given=([batch], meta_batch), estimator=differences, tolerance=1e-4)
    assert balancer.report.weights.shape == (sizes[0], 2)
    assert_right(reader, 2, given=([batch, meta_batch], meta_batch), estimator=differences, tolerance=1e-4)


class TimesFirst(Reader):
    """Its inputs are (4, B), and nothing but the user knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.T)


def test_a_size_that_cannot_be_told_is_asked_for():
    def turned(batch: Batch) -> Batch:
        return Batch(batch.inputs.T, batch.targets)

    batch, meta_batch = (turned(symbols(size, seed, joined=True)) for seed, size in enumerate((5, 6)))
    case = sgd(seeded(TimesFirst), terms={"ctc": ctc, "weight": weight}, meta_loss=ctc)
    with pytest.raises(MetaKDError, match=r"Batch\(size=\.\.\.\)"):
        balanced(case, estimator=estimators.FiniteDifference())(batch, meta_batch)
    given = [batch._replace(size=5)], meta_batch._replace(size=6)
    build = lambda: sgd(seeded(TimesFirst), terms=case.terms, meta_loss=ctc)  # noqa: E731
    assert_right(build, given=given, estimator=estimators.FiniteDifference(), tolerance=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(self.rnn(packed)[1][0][-1])


def sequences(size: int, seed: int) -> tuple[PackedSequence, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (2 * i + seed) % 5 for i in range(size)]  # not sorted
    parts = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in lengths]
    return pack_sequence(parts, enforce_sorted=False), torch.randint(3, (size,), generator=generator)


def without_labels(outputs: Tensor, batch: Batch) -> Tensor:
    return -outputs.log_softmax(1).exp().square().sum(1)


@pytest.mark.parametrize("labelled", [True, False])
def test_packed_sequences(labelled):
    items = [sequences(5, 0), sequences(6, 1)]
    terms = {"sure": without_labels, "size": lambda outputs, batch: outputs.square().mean(1)}
    options = {} if labelled else {"terms": terms, "meta_loss": without_labels}
    batch, meta_batch = (Batch(packed, y if labelled else None) for packed, y in items)

    def case() -> Case:
        return sgd(seeded(Recurrent), **options)

    for estimator in MODES:
        balancer = assert_right(case, given=([batch], meta_batch), estimator=estimator)
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    expected, balancer = balancer.report.influence, balanced(case())
    balancer(*(item if labelled else item[0] for item in items))  # as the loader yields it
    torch.testing.assert_close(balancer.report.influence, expected)
