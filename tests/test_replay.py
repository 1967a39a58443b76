"""The forward-mode pass takes products from the training pass: the same numbers, a third of the arithmetic less."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from metakd import Batch, BilevelLossBalancer, terms
from metakd.estimators import OneStep
from metakd.replay import recorded, replayed
from metakd.student import FunctionalStudent
from metakd.train_pass import TrainPass
from tests.zoo import QUIET, ZOO, TwoLevels, meet

pytestmark = QUIET

PRODUCTS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (2, 5, 3), (4, 3), 4),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2), (2, 3, 7), (4, 3, 2), 4),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 1, padding=1, groups=2), (2, 4, 5, 5), (6, 2, 3, 3), 6),
    "conv2d, one image": (lambda x, w, b: F.conv2d(x, w, b), (4, 5, 5), (6, 4, 3, 3), 6),
    "conv2d, same": (lambda x, w, b: F.conv2d(x, w, bias=b, padding="same"), (2, 4, 5, 5), (6, 4, 3, 3), 6),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, dilation=2), (1, 2, 5, 5, 5), (3, 2, 2, 2, 2), 3),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1), (2, 4, 3, 3), (4, 5, 3, 3), 5),
}


@pytest.mark.parametrize("moved", ["xwb", "x", "w", "b", "xw", "wb"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_tangents_are_torchs(name, with_bias, moved):
    function, *shapes, width = PRODUCTS[name]
    primals = {k: torch.randn(shape).double() for k, shape in zip("xwb", (*shapes, (width,)), strict=True)}
    tangents = {k: torch.randn_like(p) for k, p in primals.items()}
    if not with_bias:
        moved = moved.replace("b", "")
    with recorded() as tape:
        function(primals["x"], primals["w"], primals["b"] if with_bias else None)

    def dual():
        with forward_ad.dual_level():
            p = {k: forward_ad.make_dual(p, tangents[k]) if k in moved else p for k, p in primals.items()}
            return forward_ad.unpack_dual(function(p["x"], p["w"], p["b"] if with_bias else None))

    expected = dual()
    with replayed(tape):
        found = dual()
    assert found.primal.data_ptr() == tape[0].output.data_ptr() or not moved
    assert torch.equal(found.primal, expected.primal)
    if moved:
        torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-12, atol=1e-12)
    else:
        assert found.tangent is None


class Products(TorchDispatchMode):
    """Counts convolutions and matrix products."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (
            torch.ops.aten.convolution.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.mm.default,
        )
        return func(*args, **(kwargs or {}))


def conv_student(*middle):
    body = [nn.Conv2d(2, 4, 3), *middle, nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)]
    student = nn.Sequential(*body).double()
    student(torch.randn(1, 2, 7, 7).double())
    return student


def products_of_a_forward_mode_pass(student):
    """The numbers of products in the dual pass after a recorded training pass, and whether it is right."""
    functional = FunctionalStudent(student)
    x = torch.randn(3, 2, 7, 7).double()
    params = functional.detached()
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    outputs, counts = [], []
    with functional.untouched() as start:
        tape = TrainPass(student, functional, Batch(x), record=True).tape
        for known in (tape, ()):
            with forward_ad.dual_level(), Products() as products:
                dual = {name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()}
                outputs.append(forward_ad.unpack_dual(functional.run(dual, x, start, known)[0]))
            counts.append(products.number)
    for ours, torchs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    return counts


@pytest.mark.parametrize("middle", [nn.Tanh(), nn.BatchNorm2d(4), nn.Dropout(0.5)], ids=str)
def test_values_are_not_computed_again(middle):
    with_tape, without = products_of_a_forward_mode_pass(conv_student(middle))
    # Three values are known; torch also multiplies the zero tangent of the images.
    assert (with_tape, without) == (5, 9)


def test_an_output_that_was_written_to_is_computed_again():
    student = conv_student(nn.ReLU(inplace=True))
    with_tape, without = products_of_a_forward_mode_pass(student)
    assert (with_tape, without) == (7, 9)


def test_parameters_of_ones_own_are_not_taken_for_the_students():
    student = conv_student(nn.Tanh())
    functional, x = FunctionalStudent(student), torch.randn(3, 2, 7, 7).double()
    other = {name: 2 * p for name, p in functional.detached().items()}
    with functional.untouched() as start:
        tape = TrainPass(student, functional, Batch(x), record=True).tape
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in other.items()}
            found = forward_ad.unpack_dual(functional.run(dual, x, start, tape)[0]).primal
        torch.testing.assert_close(found, functional.run(other, x, start)[0])


def test_another_way_through_the_code_is_computed():
    w = torch.randn(4, 3).double()
    with recorded() as tape:
        F.linear(torch.ones(2, 3).double(), w)
        F.linear(torch.ones(2, 3).double(), w)
    x = torch.randn(2, 3, 5).double()
    kernel = torch.randn(4, 3, 2).double()
    with forward_ad.dual_level(), replayed(tape):
        found = forward_ad.unpack_dual(F.conv1d(x, forward_ad.make_dual(kernel, kernel)))
        after = forward_ad.unpack_dual(F.linear(5 * torch.ones(2, 3).double(), forward_ad.make_dual(w, w)))
    torch.testing.assert_close(found.primal, F.conv1d(x, kernel))
    torch.testing.assert_close(after.primal, 5 * torch.ones(2, 3).double() @ w.T)


def test_checkpointed_and_compiled_parts_are_not_kept():
    student = TwoLevels(nn.Sequential(nn.Linear(6, 6), nn.Tanh())).double()
    x = torch.randn(5, 4).double()
    tape = TrainPass(student, FunctionalStudent(student), Batch(x), record=True).tape
    assert [product.output.shape for product in tape] == [(5, 6), (5, 3)]  # the first and the last layer
    compiled = ZOO["compiled_part"].build().double()
    assert not TrainPass(compiled, FunctionalStudent(compiled), Batch(x), record=True).tape


@pytest.mark.parametrize("inplace", [False, True])
def test_the_users_backward_pass_finds_its_graph_as_it_was(inplace):
    """Two weight models that move (so the graph is kept), with and without a forward-mode pass in between."""
    gradients = []
    for mode in ("forward", "reverse"):
        torch.manual_seed(0)
        student = conv_student(nn.ReLU(inplace=inplace))
        balancer = BilevelLossBalancer(
            student,
            {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            estimator=OneStep(mode),
        )
        batch, meta = [(torch.randn(4, 2, 7, 7).double(), torch.randint(3, (4,))) for _ in range(2)]
        balancer(batch, meta).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_the_tape_does_not_outlive_the_call():
    student, batch, meta = meet("batch_norm")
    seen = []
    student[0].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output.untyped_storage())))
    balancer = BilevelLossBalancer(
        student,
        {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        accumulate=5,
    )
    loss = balancer(batch, meta)
    gc.collect()
    assert loss.requires_grad and seen and not any(ref() is not None for ref in seen)
