"""Students that are no classifiers, and the default meta loss."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import Batch, MetaKDError, check_hypergradient
from metakd.terms import CrossEntropy
from tests.cases.real_optimizers import Case, assert_right, balanced, mlp, plain, seeded, sgd
from tests.cases.real_steps import data


def mean_square(outputs: Tensor, batch: Batch) -> Tensor:
    return (outputs - batch.targets).square().flatten(1).mean(1)


def yes_or_no(outputs: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.flatten(), batch.targets.double(), reduction="none")


def several_labels(outputs: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, batch.targets, reduction="none").mean(1)


def every_pixel(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch.targets, reduction="none").flatten(1).mean(1)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 1, 2, 2))


def drawn(kind: str, size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    targets = {
        "regression": lambda: torch.randn(size, 3, dtype=torch.float64, generator=generator),
        "one number": lambda: torch.randn(size, 1, dtype=torch.float64, generator=generator),
        "several labels": lambda: torch.randint(2, (size, 3), generator=generator).double(),
        "soft labels": lambda: torch.rand(size, 3, dtype=torch.float64, generator=generator).softmax(1),
        "single logit": lambda: torch.randint(2, (size,), generator=generator),
        "dense": lambda: torch.randint(3, (size, 2, 2), generator=generator),
    }
    return Batch(x, targets[kind]())


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


STUDENTS = {
    "regression": (mlp, mean_square, r"regression or several labels .*F\.mse_loss"),
    "one number": (one_output, mean_square, r"for regression lambda outputs, batch: F\.mse_loss"),
    "several labels": (mlp, several_labels, r"several labels"),
    "soft labels": (mlp, mean_square, r"soft labels"),
    "single logit": (one_output, yes_or_no, r"binary_cross_entropy_with_logits"),
    "dense": (Pixels, every_pixel, r"one class per pixel, .*F\.cross_entropy"),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_default_meta_loss_names_the_way_to_another(kind):
    student, term, words = STUDENTS[kind]
    batch, meta_batch = drawn(kind, 5, 0), drawn(kind, 6, 1)
    balancer = plain(seeded(student), {"own": term})
    for step in (lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)):
        with pytest.raises(MetaKDError, match=rf"(?s)'meta_loss'.*{words}.*meta_loss=lambda outputs, batch"):
            step()
    terms = {"own": term, "size": lambda outputs, batch: outputs.square().flatten(1).mean(1)}

    def case() -> Case:
        return sgd(seeded(student), terms=terms, meta_loss=term)

    assert_right(case, given=([batch], meta_batch))
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    balancer = plain(seeded(student), {"own": term}, meta_loss=term)  # with the default weight model
    balancer(batch, meta_batch).backward()
    assert check_hypergradient(balancer, [batch], meta_batch, directions=1).verdict.startswith("exact")


@pytest.mark.parametrize("shape", [(5, 1), (5,)])
@pytest.mark.parametrize("loss", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_one_output_names_terms_that_fit(loss, shape):
    batch = drawn("one number" if loss == "mse_loss" else "single logit", 5, 0)
    batch = batch._replace(targets=batch.targets.view(shape))
    outputs = torch.randn(5, dtype=torch.float64)
    for given in (outputs, outputs[:, None]):
        with pytest.raises(MetaKDError) as caught:
            CrossEntropy()(given, batch)
        advised = re.search(rf"lambda outputs, batch: F\.{loss}\(.*?'none'\)", str(caught.value))[0]
        found = eval(advised)(given, batch)
        torch.testing.assert_close(found, getattr(F, loss)(outputs, batch.targets.view(5).double(), reduction="none"))


@pytest.mark.parametrize("kind", ["regression", "several labels", "dense"])
def test_the_default_features_beside_a_teacher_name_the_way_to_others(kind):
    student, term, _ = STUDENTS[kind]
    batch, meta_batch = drawn(kind, 5, 0), drawn(kind, 6, 1)
    options = {"teacher": seeded(student), "meta_loss": term}
    with pytest.raises(MetaKDError, match=r"the default features .*features=lambda losses, outputs, batch: losses"):
        plain(seeded(student), {"own": term}, **options)(batch, meta_batch)
    balancer = plain(seeded(student), {"own": term}, features=lambda losses, outputs, batch: losses, **options)
    balancer(batch, meta_batch)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.first(x) * self.second(other).tanh()


def paired(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.inputs, batch.inputs.sin(), batch.targets


@pytest.mark.parametrize("convert", [lambda y: y, lambda y: y.double(), lambda y: F.one_hot(y, 3)])
def test_items_of_two_inputs_and_their_targets(convert):
    batch, meta_batch = ((x, other, convert(y)) for x, other, y in map(paired, data()))
    balancer = plain(seeded(Two), [CrossEntropy()])
    for step in (lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)):
        with pytest.raises(MetaKDError, match=r"batch_fn=.*positions in the training set|positions in the.*batch_fn="):
            step()


def test_two_inputs_by_batch_fn():
    pairs = [Batch((x, other), y) for x, other, y in map(paired, data())]
    expected = assert_right(lambda: sgd(seeded(Two)), given=(pairs[:1], pairs[1])).report.influence
    balancer = balanced(sgd(seeded(Two)), batch_fn=lambda item: Batch(inputs=(item[0], item[1]), targets=item[2]))
    balancer(*map(paired, data()))
    torch.testing.assert_close(balancer.report.influence, expected)
