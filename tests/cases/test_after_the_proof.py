"""What a student may do later, far from where it is, or where a walk does not look: right, noticed, or put back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakd import MetaKDError
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH
from tests.cases.real_steps import Setup, balanced, data


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x):
        return self.net(x)


def refused(student, words):
    before = copy.deepcopy(student.state_dict())
    balancer = balanced(Setup(student.double(), HARD_AND_SMOOTH))
    with pytest.raises(MetaKDError, match=words):
        balancer(*data())
    assert all(torch.equal(value, before[name].to(value)) for name, value in student.state_dict().items())


class PositiveDefinite(Net):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3) + 30)

    def forward(self, x):
        return self.net(x) @ torch.linalg.cholesky(self.matrix)


class Checked(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([0.2, 0.3, 0.5]))

    def forward(self, x):
        assert float(self.mix.detach().sum()) < 1.02
        return self.net(x) * self.mix


@pytest.mark.parametrize("student", [PositiveDefinite, Checked])
def test_a_model_that_works_only_near_its_parameters_is_proven_there(student):
    torch.manual_seed(0)
    made = student().double()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    balanced(Setup(made, HARD_AND_SMOOTH))(*data()).backward()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


class Clamped(Net):
    """Input-convex: its weights are to be positive, and are at first."""

    def __init__(self):
        super().__init__()
        self.net[2].weight.data.clamp_(min=0)

    def forward(self, x):
        self.net[2].weight.data.clamp_(min=0)
        return self.net(x)


def test_a_clamp_that_does_nothing_yet_is_refused():
    refused(Clamped(), r"writes to parameters \(net.2.weight\)")


class WritesLater(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 4 == 0:
            self.net[2].weight.data.mul_(0.5)
        return self.net(x)


def test_virtual_passes_do_not_write_to_parameters():
    torch.manual_seed(0)
    student = WritesLater().double()
    weight = student.net[2].weight.detach().clone()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    for _ in range(4):
        balancer(*data())
    assert torch.equal(student.net[2].weight, weight / 2)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.decoder.weight.data = self.encoder.weight.data

    def forward(self, x):
        return self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))


def test_two_parameters_on_one_storage_are_refused():
    torch.manual_seed(0)
    student = Halves()
    student.encoder.weight.data = student.encoder.weight.data.double()
    student.double()
    student.decoder.weight.data = student.encoder.weight.data
    refused(student, r"'encoder.weight' and 'decoder.weight' share memory|'decoder.weight' and 'encoder.weight'")


def test_parts_of_one_flat_storage_are_no_trouble():
    torch.manual_seed(0)
    student = Net().double()
    flat = torch.cat([p.detach().flatten() for p in student.parameters()])
    begin = 0
    for p in student.parameters():
        p.data = flat[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    balanced(Setup(student, HARD_AND_SMOOTH))(*data())


class Toggles(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.net[2].bias.requires_grad_(self.calls % 2 == 0)
        return self.net(x)


def test_parameters_that_freeze_in_the_pass_are_refused():
    refused(Toggles(), r"changes requires_grad of parameters \(net.2.bias\)")


class Counts(Net):
    def __init__(self, kind):
        super().__init__()
        self.seen = [0] * 5_000 if kind is list else dict.fromkeys(range(5_000), 0)

    def forward(self, x):
        for i in range(len(x)):
            self.seen[i] += 1
        return self.net(x)


@pytest.mark.parametrize("kind", [list, dict])
def test_long_histories_are_put_back(kind):
    student = Counts(kind).double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    for calls in (1, 2):
        balancer(*data())
        assert student.seen[0] == calls


class Switched(Net):
    """Scales gradients by a hook from some epoch on."""

    def __init__(self):
        super().__init__()
        self.auxiliary = False

    def forward(self, x):
        z = self.net[:2](x)
        if self.auxiliary and z.requires_grad:
            z.register_hook(lambda g: g.detach() * 0.5)
        return self.net[2](z)


@pytest.mark.filterwarnings("ignore:forward mode is wrong")
def test_a_switch_asks_for_another_proof():
    student = Switched().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    balancer(*data())
    student.auxiliary = True
    with pytest.raises(MetaKDError, match="reverse mode is wrong on this model"):
        balancer(*data())


def test_another_meta_loss_is_followed():
    torch.manual_seed(0)
    student = Net().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    balancer(*data())
    weight = student.net[2].weight

    def decayed(outputs, batch):
        return F.cross_entropy(outputs, batch.targets, reduction="none") + weight.square().sum()

    balancer.meta_loss = decayed
    balancer(*data())
    expected = balanced(Setup(student, HARD_AND_SMOOTH, decayed))
    expected(*data())
    torch.testing.assert_close(balancer.report.influence, expected.report.influence)
