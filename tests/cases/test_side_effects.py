"""Side effects of a pass: inputs changed in place, counters, generators of its own."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH, body
from tests.cases.real_steps import Setup, assert_right, balanced, data


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.5).add_(0.1))


class ChangesItsInputsData(ChangesItsInput):
    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(0.5).add_(0.1)  # unlike x.mul_, it does not count as a version
        return self.net(x)


class ChangesItsInputsArray(ChangesItsInput):
    def forward(self, x: Tensor) -> Tensor:
        x.numpy()[...] *= 0.5
        return self.net(x)


class Counts(nn.Module):
    """What it computes depends on how often it was called: an attribute, a class variable, a list."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).calls = 0
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.count, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        type(self).calls += 1
        self.seen.append(len(x))
        return self.net(x * (1 + 0.3 * self.count) + 0.1 * type(self).calls + 0.05 * len(self.seen))


class OwnGenerators(nn.Module):
    """Draws masks from generators of its own: torch's, NumPy's, Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.torchs = torch.Generator().manual_seed(0)
        self.numpys = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, generator=self.torchs, dtype=x.dtype)
        mask = mask * torch.as_tensor(self.numpys.random(x.shape)) + torch.as_tensor(self.legacy.rand(*x.shape))
        return self.net(x * mask)


class RunningAverage(nn.Module):
    """Keeps an average in a tensor that is no buffer, and in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.average, self.array = torch.zeros(4, dtype=torch.float64), np.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(0.5 * x.detach().mean(0))
        self.array[...] = 0.5 * self.array + x.detach().mean(0).numpy()
        return self.net(x - self.average - torch.as_tensor(self.array))


INPUTS = [ChangesItsInput, ChangesItsInputsData, ChangesItsInputsArray]


@pytest.mark.parametrize("student", [*INPUTS, Counts, OwnGenerators, RunningAverage])
def test_side_effects_of_a_pass(student):
    assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))


@pytest.mark.parametrize("student", [*INPUTS, Counts, OwnGenerators, RunningAverage])
def test_a_call_has_the_side_effects_of_one_pass(student):
    torch.manual_seed(1)
    one = student().double()
    batch, meta_batch = data()
    inputs = batch.inputs.clone()
    one(inputs)
    expected = {name: value for name, value in vars(one).items() if not name.startswith("_")}
    calls = type(one).__dict__.get("calls")
    torch.manual_seed(1)
    other = student().double()
    mine = batch.inputs.clone()
    meta = meta_batch.inputs.clone()
    balanced(Setup(other, HARD_AND_SMOOTH))((mine, batch.targets), (meta, meta_batch.targets))
    assert torch.equal(mine, inputs) and torch.equal(meta, meta_batch.inputs)
    assert type(other).__dict__.get("calls") == calls
    for name, value in expected.items():
        found = getattr(other, name)
        if isinstance(value, torch.Generator):
            assert torch.equal(found.get_state(), value.get_state())
        elif isinstance(value, np.random.Generator):
            assert found.bit_generator.state == value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            assert np.array_equal(found.get_state()[1], value.get_state()[1])
            assert found.get_state()[2] == value.get_state()[2]
        elif isinstance(value, Tensor):
            assert torch.equal(found, value)
        else:
            assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value, name
