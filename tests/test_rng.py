"""Generators are captured and put back."""

import random
import sys

import hypothesis.strategies as st
import numpy
import torch
from hypothesis import given

from metakd._basics.rng import RngState


def draws():
    return (
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(2).tolist(),
    )


@given(st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_what_follows_a_state_is_repeated(seed, between):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    for _ in range(between):
        draws()
    state = RngState.capture([torch.device("cpu")])
    first = draws()
    for _ in range(2):
        state.restore()
        assert draws() == first
    assert draws() != first


def test_capturing_draws_nothing_and_later_draws_leave_the_state_alone():
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    first = draws()
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    state = RngState.capture([])
    kept = state.cpu.clone()
    assert draws() == first
    assert torch.equal(state.cpu, kept)
    state.restore()
    assert draws() == first


def test_no_cuda_generator_is_asked_for_cpu_devices():
    assert RngState.capture({torch.device("cpu"), torch.device("meta")}).cuda == {}


def test_numpy_that_was_not_imported_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    state = RngState.capture([])
    assert state.numpy is None
    first = torch.rand(3).tolist(), random.random()
    monkeypatch.undo()  # somebody imports it in between
    numpy.random.seed(7)
    expected = numpy.random.rand(2).tolist()
    numpy.random.seed(7)
    state.restore()
    assert (torch.rand(3).tolist(), random.random()) == first
    assert numpy.random.rand(2).tolist() == expected
