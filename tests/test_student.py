"""The student as a function: arguments, wrappers, repetition, kernels."""

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, terms
from metakd.student import FunctionalStudent, call, unwrap
from tests.zoo import ZOO, meet


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()

    def forward(self, left, right, scale=1.0):
        return scale * (self.a(left) + self.b(right))


LEFT, RIGHT = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


INPUTS = [(LEFT, RIGHT), [LEFT, RIGHT], {"left": LEFT, "right": RIGHT, "scale": 1.0}]


@pytest.mark.parametrize("inputs", INPUTS, ids=type)
def test_inputs_are_arguments(inputs):
    student = TwoInputs()
    expected = student(LEFT, RIGHT)
    torch.testing.assert_close(call(student, inputs), expected)
    functional = FunctionalStudent(student)
    outputs, _ = functional.run(functional.detached(), inputs, functional.start())
    torch.testing.assert_close(outputs, expected)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=optimizer)
    batch = (inputs, torch.tensor([0, 1, 2, 0, 1]))
    assert balancer(batch, batch).requires_grad


def test_wrappers_are_looked_through():
    bare = nn.Linear(4, 3)
    assert unwrap(bare) is bare
    assert unwrap(nn.DataParallel(nn.DataParallel(bare))) is bare
    assert unwrap(torch.compile(bare, backend="eager")) is bare


def test_a_compiled_student_learns_as_the_bare_one():
    results = []
    for compiled in (False, True):
        student, batch, meta_batch = meet("mlp")
        wrapped = torch.compile(student, backend="eager") if compiled else student
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        torch.manual_seed(1)
        balancer = BilevelLossBalancer(wrapped, [terms.CrossEntropy()], optimizer=optimizer)
        balancer(batch, meta_batch).backward()
        results.append((balancer.report.influence, student[0].weight.grad))
    for bare, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, bare, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ZOO)
def test_a_run_is_a_pure_function(name):
    student, (x, _), _ = meet(name)
    functional = FunctionalStudent(student)
    with functional.untouched():
        start = functional.start()
        kept = {key: value.clone() for key, value in start.buffers.items()}
        first, end = functional.run(functional.detached(), x, start)
        again, same_end = functional.run(functional.detached(), x, start)
    assert torch.equal(first, again)
    for key, value in kept.items():
        assert torch.equal(start.buffers[key], value)
        assert torch.equal(end.buffers[key], same_end.buffers[key])
    assert torch.equal(end.rng.cpu, same_end.rng.cpu)


@pytest.mark.parametrize("name", ["batch_norm_cumulative", "dropout", "moving_centre"])
def test_runs_in_a_row_are_calls_in_a_row(name):
    student, (x, _), (meta_x, _) = meet(name)
    functional = FunctionalStudent(student)
    with functional.untouched():
        _, middle = functional.run(functional.detached(), x, functional.start())
        found, end = functional.run(functional.detached(), meta_x, middle)
    student(x)
    torch.testing.assert_close(found, student(meta_x), rtol=1e-12, atol=1e-12)
    for key, buffer in student.named_buffers():
        torch.testing.assert_close(end.buffers[key], buffer, rtol=1e-12, atol=1e-12)


def test_kernels_are_put_back_after_an_error():
    student, _, _ = meet("lstm")
    functional = FunctionalStudent(student)
    with functional.untouched(), pytest.raises(ValueError):
        functional.run(functional.detached(), torch.zeros(()).double(), functional.start())
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_error_of_the_students_own_stays_its_own():
    student, _, _ = meet("mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(student, torch.zeros(5, 3).double())
    with pytest.raises(MetaKDError, match=r"Sequential cannot be called.*float64.*float32.*cast the inputs"):
        call(student, torch.zeros(5, 4))
