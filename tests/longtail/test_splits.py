"""Long-tailed splits: the field's sizes, disjointness, determinism, and as large as the data allow."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metakd.errors import MetaKDError
from metakd.longtail import largest_n_max, long_tail_counts, long_tailed_split


def labels(sizes):
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[order]


@pytest.mark.parametrize(
    ("classes", "per_class", "imbalance", "size"),
    [
        (10, 5000, 10, 20_021),
        (10, 5000, 50, 13_717),
        (10, 5000, 100, 12_156),
        (100, 500, 10, 19_183),
        (100, 500, 50, 12_354),
        (100, 500, 100, 10_626),
    ],
)
def test_sizes_of_cifar_lt(classes, per_class, imbalance, size):
    targets = labels([per_class] * classes)
    validation = 1000 // classes
    split = long_tailed_split(targets, imbalance, validation_per_class=validation)
    assert len(split.train) == sum(split.counts) == size
    assert split.counts[0] == per_class - validation
    assert torch.bincount(targets[split.validation]).tolist() == [validation] * classes
    assert tuple(torch.bincount(targets[split.train]).tolist()) == split.counts


def test_images_cut_for_a_smaller_imbalance_give_the_same_split_sizes():
    sizes = [100 + int(4900 * 10 ** (-c / 9)) for c in range(10)]
    assert len(long_tailed_split(labels(sizes), 50, validation_per_class=100).train) == 13_717


def test_train_and_validation_are_disjoint_and_hold_no_image_twice():
    split = long_tailed_split(labels([50] * 5), 5, validation_per_class=7)
    both = torch.cat([split.train, split.validation])
    assert len(both.unique()) == len(both)


def test_the_seed_decides_which_images():
    targets = labels([60] * 4)
    one, same, other = (long_tailed_split(targets, 6, validation_per_class=5, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.train, same.train)
    assert torch.equal(one.validation, same.validation)
    assert set(one.validation.tolist()) != set(other.validation.tolist())
    assert one.counts == other.counts


def test_a_longer_tail_keeps_a_subset():
    targets = labels([80] * 4)
    short, long = (long_tailed_split(targets, rho, validation_per_class=5) for rho in (4, 20))
    assert set(long.train.tolist()) < set(short.train.tolist())
    assert torch.equal(short.validation, long.validation)


def test_without_imbalance_everything_else_is_kept():
    split = long_tailed_split(labels([9, 30, 4]), None, validation_per_class=2)
    assert split.counts == (7, 28, 2)


@given(st.lists(st.integers(1, 300), min_size=2, max_size=8), st.floats(1, 200), st.data())
def test_largest_n_max_is_feasible_and_one_more_is_not(available, imbalance, data):
    n_max = largest_n_max(available, imbalance)
    ratios = [imbalance ** (-c / (len(available) - 1)) for c in range(len(available))]
    assert all(int(n_max * r) <= a for r, a in zip(ratios, available, strict=True))
    more = n_max + data.draw(st.integers(1, 300))
    assert any(int(more * r) > a for r, a in zip(ratios, available, strict=True))


@given(st.integers(2, 100), st.integers(100, 5000), st.floats(1, 100))
def test_counts_fall_from_n_max_by_the_imbalance(classes, n_max, imbalance):
    counts = long_tail_counts(classes, n_max, imbalance)
    assert counts[0] == n_max
    assert counts == sorted(counts, reverse=True)
    assert abs(counts[-1] - n_max / imbalance) <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: long_tail_counts(10, 20, 50), ["n_max=20", "imbalance=50", "at most 20"]),
        (lambda: long_tail_counts(10, 20, 0.5), ["imbalance >= 1", "imbalance=0.5"]),
        (lambda: long_tail_counts(10, 20, float("nan")), ["imbalance >= 1"]),
        (
            lambda: long_tailed_split(labels([50, 5, 50]), 2, validation_per_class=5),
            ["class 1 has 5 images", "at most 4"],
        ),
        (
            lambda: long_tailed_split(labels([50, 20, 50]), 2, validation_per_class=5, n_max=40),
            ["class 1 has 15 images", "needs 28", "at most 22"],
        ),
        (
            lambda: long_tailed_split(torch.tensor([0, 0, 2, 2]), 2, validation_per_class=1),
            ["class 1 has no image"],
        ),
        (
            lambda: long_tailed_split(torch.tensor([], dtype=torch.long), 2, validation_per_class=1),
            ["no image"],
        ),
    ],
)
def test_errors_name_cause_and_cure(call, words):
    with pytest.raises(MetaKDError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("imbalance", [-3.0, 0.5, float("inf"), float("nan")])
def test_an_imbalance_below_one_is_named(imbalance):
    with pytest.raises(MetaKDError, match=r"largest class over the smallest, at least 1"):
        long_tailed_split(torch.arange(40) % 4, imbalance, validation_per_class=1)
