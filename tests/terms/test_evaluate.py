"""Names of terms, and the table of losses they make together."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from metakd.batch import Batch
from metakd.errors import MetaKDError
from metakd.terms import CrossEntropy, SoftTarget, evaluate, named

Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
BATCH = Batch(torch.zeros(3, 2), torch.tensor([0, 1, 3]), torch.zeros(3, 4))


class KLDivergence2D(CrossEntropy):
    pass


def focal(outputs, batch):
    return CrossEntropy()(outputs, batch).square()


def message(function, *args):
    with pytest.raises(MetaKDError) as caught:
        function(*args)
    return str(caught.value)


def test_a_mapping_keeps_its_names_and_order():
    terms = {"soft": SoftTarget(), "hard": CrossEntropy()}
    assert list(named(terms).items()) == list(terms.items())
    modules = nn.ModuleDict({"a": nn.Identity()})
    assert list(named(modules)) == ["a"]


def test_a_sequence_is_named_after_classes_and_functions():
    anonymous = lambda outputs, batch: Z[:, 0]  # noqa: E731
    terms = [anonymous, CrossEntropy(), focal, CrossEntropy(), KLDivergence2D(), anonymous]
    names = ["term_0", "cross_entropy", "focal", "cross_entropy_2", "kl_divergence2_d", "term_5"]
    found = named(terms)
    assert list(found) == names and list(found.values()) == terms
    assert list(named(nn.ModuleList([nn.CrossEntropyLoss()]))) == ["cross_entropy_loss"]


def test_made_up_names_never_collide():
    def cross_entropy_2(outputs, batch):
        return Z[:, 0]

    terms = [cross_entropy_2, CrossEntropy(), CrossEntropy(), cross_entropy_2]
    assert list(named(terms)) == ["cross_entropy_2", "cross_entropy", "cross_entropy_3", "cross_entropy_2_2"]


@pytest.mark.parametrize("terms", [{}, [], (), nn.ModuleDict()])
def test_no_terms(terms):
    assert "there are no terms" in message(named, terms)
    assert "there are no terms" in message(evaluate, dict(terms), Z, BATCH)


@pytest.mark.parametrize("terms", [{"x": 3}, {"x": None}])
def test_a_term_that_cannot_be_called(terms):
    assert "term 'x' cannot be called" in message(named, terms)


def test_a_term_that_cannot_be_called_in_a_sequence():
    found = message(named, [CrossEntropy(), "cross_entropy"])
    assert "term at position 1 cannot be called, it is str" in found


def test_a_class_in_place_of_an_object():
    assert "is the class CrossEntropy" in message(named, [CrossEntropy])
    assert "write CrossEntropy()" in message(named, {"hard": CrossEntropy})


@pytest.mark.parametrize("terms", [CrossEntropy(), "cross_entropy", None, 3])
def test_what_is_no_collection(terms):
    found = message(named, terms)
    assert type(terms).__name__ in found and "[CrossEntropy()]" in found


@pytest.mark.parametrize("name", ["", 0, None])
def test_a_bad_name(name):
    assert repr(name) in message(named, {name: CrossEntropy()})


@pytest.mark.parametrize("rows", [1, 3])
def test_losses_stand_side_by_side_in_order(rows):
    batch = Batch(None, BATCH.targets[:rows], BATCH.teacher[:rows])
    terms = {"soft": SoftTarget(), "own": lambda z, batch: z.sum(1), "hard": CrossEntropy()}
    found = evaluate(terms, Z[:rows], batch)
    assert found.shape == (rows, 3)
    for column, term in zip(found.T, terms.values(), strict=True):
        torch.testing.assert_close(column, term(Z[:rows], batch), rtol=0, atol=0)


def test_dual_numbers_pass_through():
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(Z, torch.ones_like(Z))
        found = evaluate({"sum": lambda z, batch: z.sum(1)}, moving, BATCH)
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, torch.full((3, 1), 4.0))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (torch.zeros(()), "shape ()"),
        (torch.zeros(1), "shape (1,)"),
        (torch.zeros(3, 4), "shape (3, 4)"),
        (torch.zeros(4), "shape (4,)"),
    ],
)
def test_a_wrong_shape(loss, got):
    found = message(evaluate, {"hard": CrossEntropy(), "bad one": lambda z, batch: loss}, Z, BATCH)
    assert "term 'bad one'" in found and f"returned {got}, expected (3,)" in found
    assert "reduction='none'" in found and "3 samples in batch.targets" in found


def test_a_scalar_is_wrong_for_a_batch_of_one_too():
    batch = Batch(None, torch.tensor([0]))
    assert "expected (1,)" in message(evaluate, {"x": lambda z, batch: z.mean()}, Z[:1], batch)


@pytest.mark.parametrize("loss", [1.0, None, [0.0, 0.0, 0.0]])
def test_what_is_no_tensor(loss):
    found = message(evaluate, {"x": lambda z, batch: loss}, Z, BATCH)
    assert "term 'x'" in found and type(loss).__name__ in found and "shape (3,)" in found


def test_a_complex_loss():
    found = message(evaluate, {"x": lambda z, batch: torch.zeros(3, dtype=torch.complex64)}, Z, BATCH)
    assert "term 'x' returned torch.complex64" in found and ".abs()" in found and ".real" in found


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_dtype_without_gradient(dtype):
    found = message(evaluate, {"x": lambda z, batch: torch.zeros(3, dtype=dtype)}, Z, BATCH)
    assert "term 'x'" in found and str(dtype) in found and "floating" in found


def test_losses_on_two_devices():
    terms = {"here": lambda z, batch: z.sum(1), "there": lambda z, batch: torch.zeros(3, device="meta")}
    found = message(evaluate, terms, Z, BATCH)
    assert "'here' on cpu" in found and "'there' on meta" in found


def test_an_exception_in_a_term_is_named_and_chained():
    def broken(outputs, batch):
        raise ValueError("no such column")

    with pytest.raises(MetaKDError, match=r"term 'x' raised ValueError: no such column") as caught:
        evaluate({"x": broken}, Z, BATCH)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "a tensor of shape (3, 4)" in str(caught.value)


def test_a_loss_module_of_torch_is_told_how_a_term_is_called():
    assert "called as term(outputs, batch)" in message(evaluate, {"x": nn.CrossEntropyLoss()}, Z, BATCH)


def test_the_librarys_own_error_gets_the_terms_name():
    with pytest.raises(MetaKDError, match=r"^term 'soft': the teacher's outputs are missing") as caught:
        evaluate({"soft": SoftTarget()}, Z, Batch(None))
    assert isinstance(caught.value.__cause__, MetaKDError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_untouched(kind):
    def interrupted(outputs, batch):
        raise kind

    with pytest.raises(kind):
        evaluate({"x": interrupted}, Z, BATCH)


@pytest.mark.parametrize(
    ("outputs", "batch", "source"),
    [
        (Z, Batch(None, {"y": torch.zeros(3)}), "batch.targets"),
        (Z, Batch(None, [{"boxes": torch.zeros(2, 4)}] * 3), "batch.targets"),
        (torch.zeros(5, 3, 4), Batch(torch.zeros(3, 5), (torch.zeros(9), torch.ones(3))), "batch.targets"),
        (torch.zeros(5, 3, 4), Batch(torch.zeros(7, 3), torch.zeros(7), size=3), "the batch, by its size"),
        (Z, Batch(None), "the outputs"),
        (SimpleNamespace(logits=Z), Batch(None), "the outputs"),
        ((Z, Z), Batch({"x": torch.zeros(3, 2)}), "batch.inputs"),
    ],
)
def test_where_the_batch_size_comes_from(outputs, batch, source):
    assert evaluate({"x": lambda z, batch: torch.zeros(3)}, outputs, batch).shape == (3, 1)
    found = message(evaluate, {"x": lambda z, batch: torch.zeros(2)}, outputs, batch)
    assert f"3 samples in {source};" in found and "Batch(size=...)" in found


def test_a_batch_of_unknown_size():
    found = message(evaluate, {"x": lambda z, batch: torch.zeros(3)}, (Z, Z), Batch(None))
    assert "cannot tell how many samples" in found and "Batch(targets=...)" in found


OUTPUTS_OF_NO_CLASSIFIER = {
    "regression": (torch.zeros(3, 2), torch.zeros(3, 2)),
    "several labels": (torch.zeros(3, 4), torch.ones(3, 4)),
    "several labels, integers": (torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.int64)),
    "dense": (torch.zeros(3, 4, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64)),
    "one number": (torch.zeros(3), torch.zeros(3)),
    "one logit": (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),
    "no tensor": ((Z, Z), torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", OUTPUTS_OF_NO_CLASSIFIER)
def test_the_default_meta_loss_says_that_there_are_others(case):
    outputs, targets = OUTPUTS_OF_NO_CLASSIFIER[case]
    found = message(evaluate, {"meta_loss": CrossEntropy()}, outputs, Batch(None, targets))
    assert "term 'meta_loss': " in found and "meta_loss=lambda outputs, batch: ..." in found
    assert "meta_loss=" not in message(evaluate, {"hard": CrossEntropy()}, outputs, Batch(None, targets))
    assert "meta_loss=" not in message(evaluate, {"meta_loss": focal}, outputs, Batch(None, targets))
