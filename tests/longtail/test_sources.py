"""Sources: labels as their kind says, images that are neither lost nor shared, weights by source."""

import pytest
import torch

from metakd import Batch, MetaKDError
from metakd.longtail import LongTailed, Mixture, from_sources, load_images


@pytest.fixture(scope="module")
def clean():
    return LongTailed.cut(load_images("digits"), 5, batch_size=32, validation_per_class=8, seed=3)


def test_labels_are_wrong_as_often_as_the_kind_of_their_source_says(clean):
    found = from_sources(clean, 10, seed=3)
    source, labels = found.data.train.columns["source"], found.data.train.targets
    right = labels == clean.train.targets
    kind = [torch.isin(source, torch.tensor(found.of_kind(kind))) for kind in ("right", "half wrong", "always wrong")]
    assert right[kind[0]].all() and not right[kind[2]].any()
    assert 0.35 < right[kind[1]].float().mean() < 0.65
    assert torch.equal(labels[kind[2]], (clean.train.targets[kind[2]] + 1) % 10)
    assert found.right == pytest.approx(float(right.float().mean()))
    assert list(found.counts) == torch.bincount(source, minlength=10).tolist() and found.data.counts == clean.counts


def test_meta_and_choice_images_are_balanced_halves_of_the_validation_images(clean):
    found = from_sources(clean, 4)
    meta, choice = found.data.validation, found.choice
    for part in (meta, choice):
        assert torch.bincount(part.targets).tolist() == [4] * 10
    seen = {image.numpy().tobytes() for part in (meta, choice) for image in part.images}
    assert seen == {image.numpy().tobytes() for image in clean.validation.images} and len(seen) == 80
    assert meta.columns == {} and len(next(meta.endless(0))) == 3


def test_batches_name_the_source_of_each_image(clean):
    train = from_sources(clean, 6).data.train
    inputs, targets, index, columns = next(train.epoch(1))
    assert torch.equal(columns["source"], train.columns["source"][index]) and len(inputs) == len(targets) == 32


def test_sources_depend_on_the_seed_alone(clean):
    one, same, other = (from_sources(clean, 10, seed=seed).data.train.targets for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_too_few_sources_or_images_are_refused(clean):
    with pytest.raises(MetaKDError, match="got 3 sources and 8 validation images a class"):
        from_sources(clean, 3)
    few = LongTailed.cut(load_images("digits"), 5, batch_size=32, validation_per_class=1)
    with pytest.raises(MetaKDError, match="1 validation images a class"):
        from_sources(few, 10)


def test_a_mixture_without_sources_or_meta_images():
    one = Mixture(torch.tensor([[0.25, 0.75]]))
    assert one(Batch(torch.zeros(3, 1))).tolist() == [[0.25, 0.75]]
    from_meta = Batch(torch.zeros(2, 1), columns={"from_meta": torch.tensor([0, 1])})
    assert one._replace(meta=torch.tensor([1.0, 0.0]))(from_meta).tolist() == [[0.25, 0.75], [1.0, 0.0]]
