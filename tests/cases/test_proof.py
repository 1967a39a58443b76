"""What virtual passes cannot follow is refused by name; when that is looked at."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from metakd import MetaKDError
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH, body
from tests.cases.real_steps import Setup, balanced, data


class Hidden(nn.Module):
    """Draws from a generator in an object that the walk cannot look into."""

    class Foreign:
        __module__ = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.hidden = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)), self.Foreign()
        self.hidden.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * torch.rand(x.shape, generator=self.hidden.generator, dtype=x.dtype))


class FromElsewhere(nn.Module):
    """Reads a parameter from an object in which nothing can be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES))
        self.optimizer = torch.optim.SGD([self.net[1].weight], lr=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.optimizer.param_groups[0]["params"][0].square().sum() * x[:, :CLASSES]


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (Hidden, "other losses than the real one: term 'hard'"),
        (FromElsewhere, "gradient of a virtual pass .*'net.1.weight'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(student, words):
    balancer = balanced(Setup(student().double(), HARD_AND_SMOOTH))
    batch, meta_batch = data()
    before = {name: p.detach().clone() for name, p in balancer.student.named_parameters()}
    for _ in range(2):  # it is not forgotten after the first time
        with pytest.raises(MetaKDError, match=words):
            balancer(batch, meta_batch)
    assert all(torch.equal(p, before[name]) for name, p in balancer.student.named_parameters())
    with pytest.raises(MetaKDError, match=words):
        balancer.meta_step([batch, batch], meta_batch)


def test_the_proof_is_given_anew_when_what_it_stands_on_changes():
    torch.manual_seed(1)
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()
    balancer, (batch, meta_batch) = balanced(Setup(student, HARD_AND_SMOOTH)), data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)

    def reverse(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: -g)

    student[0].register_forward_hook(reverse)
    with pytest.warns(UserWarning, match="forward mode is wrong"):
        balancer(batch, meta_batch)


def test_a_proof_can_be_repeated_or_left_out():
    batch, meta_batch = data()
    with pytest.raises(MetaKDError, match="verify is 0"):
        balanced(Setup(Hidden().double(), HARD_AND_SMOOTH), verify=0)
    balanced(Setup(Hidden().double(), HARD_AND_SMOOTH), verify=False)(batch, meta_batch)

    class BreaksLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.hidden = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)), Hidden.Foreign()
            self.hidden.generator = None

        def forward(self, x: Tensor) -> Tensor:
            noise = 0.0 if self.hidden.generator is None else torch.rand(x.shape, generator=self.hidden.generator)
            return self.net(x + noise)

    for verify, fails in ((True, False), (3, True)):
        student = BreaksLater().double()
        balancer = balanced(Setup(student, HARD_AND_SMOOTH), verify=verify)
        balancer(batch, meta_batch)
        student.hidden.generator = torch.Generator().manual_seed(0)
        balancer(batch, meta_batch)
        balancer(batch, meta_batch)
        if fails:
            with pytest.raises(MetaKDError, match="other losses"):
                balancer(batch, meta_batch)
        else:
            balancer(batch, meta_batch)
