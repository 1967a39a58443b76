"""One optimizer or several: who holds what, at which learning rate."""

import pytest
import torch
import torchopt
from torch import nn

from metakd import MetaKDError, validate
from metakd.inner import apply, inner_optimizer, learning_rate, mirror, optimizers, param_groups, plain_sgd


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def by_dimension(model, matrices=torch.optim.RMSprop, rest=torch.optim.AdamW):
    """One optimizer for the matrices, and one with two groups for the rest."""
    first = matrices([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    second = rest([{"params": [model[0].bias]}, {"params": [model[2].bias], "lr": 0.3}], lr=0.2)
    return first, second


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's and Lightning's: all that counts is in `.optimizer`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Adafactor(torch.optim.Optimizer):
    """As Hugging Face's, which finds its own learning rate."""

    def __init__(self, params, lr=None):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        raise NotImplementedError


def test_one_optimizer_or_several():
    first, second = by_dimension(student())
    assert optimizers(first) == (first,)
    for both in ([first, second], (first, second), [Wrapped(first), Wrapped(Wrapped(second))]):
        assert optimizers(both) == (first, second)
        found = param_groups(both)
        assert [owner for owner, _ in found] == [first, second, second]
        assert [id(group) for _, group in found] == [id(g) for g in (*first.param_groups, *second.param_groups)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("sgd", "got str"),
        (None, "got NoneType"),
        ([], "an empty list"),
        ([torch.optim.SGD([nn.Parameter(f64(1))]), torch.optim.SGD], "a list that holds type"),
        (torch.optim.SGD, "got type"),
        (torchopt.sgd(lr=0.1), "GradientTransformation"),
    ],
)
@pytest.mark.parametrize("read", [optimizers, param_groups, lambda given: inner_optimizer("sgd", given, {})])
def test_what_is_no_optimizer(wrong, words, read):
    with pytest.raises(MetaKDError, match=rf"(?s)must be the student's torch optimizer, or a list .*{words}"):
        read(wrong)


@pytest.mark.parametrize("warm", [0, 2])
def test_two_optimizers_each_move_their_own_by_their_own_rule(warm):
    model = student()
    both, params = by_dimension(model), dict(model.named_parameters())

    def real_step(t):
        for p in params.values():
            p.grad = torch.full_like(p, 0.1 + t) * p.detach()
        for optimizer in both:
            optimizer.step()

    for t in range(warm):
        real_step(t)
    inner = mirror(both, params)
    at, state, path = {name: p.detach().clone() for name, p in params.items()}, inner.state, []
    for t in range(warm, warm + 3):
        g = {name: (0.1 + t) * p for name, p in at.items()}
        at, state = apply(inner.transformation, g, state, at)
        path.append(at)
    for t, virtual in zip(range(warm, warm + 3), path, strict=True):
        real_step(t)
        real = {name: p.detach() for name, p in params.items()}
        torch.testing.assert_close(virtual, real, rtol=1e-12, atol=1e-12)


def test_plain_sgd_takes_the_rates_of_all_groups():
    model = student()
    params = dict(model.named_parameters())
    inner = plain_sgd(by_dimension(model), params)
    updates, _ = inner.transformation.update({name: torch.ones_like(p) for name, p in params.items()}, inner.state)
    assert {name: -u.unique().item() for name, u in updates.items()} == {
        "0.weight": 0.1,
        "0.bias": 0.2,
        "2.weight": 0.1,
        "2.bias": 0.3,
    }


CHOICES = ["sgd", "mirror", torchopt.adam(lr=0.1)]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_parameter_that_two_optimizers_hold(choice):
    model = student()
    both = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters())
    with pytest.raises(MetaKDError, match=r"'2\.weight' is held 2 times, by SGD and AdamW, .* one optimizer"):
        inner_optimizer(choice, both, dict(model.named_parameters()))
    (finding,) = validate(model, both)
    assert finding.level == "error" and finding.where == "2.weight, 2.bias"
    assert "more than once (by SGD and AdamW)" in finding.problem


@pytest.mark.parametrize("choice", CHOICES)
def test_what_no_optimizer_of_several_holds(choice):
    model, other = student(), student()
    both = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW([model[2].weight])
    with pytest.raises(MetaKDError, match=r"1 trainable parameter\(s\) .* not in the optimizer: \['2.bias'\]"):
        inner_optimizer(choice, both, dict(model.named_parameters()))
    with pytest.raises(MetaKDError, match=r"none of the student's trainable parameters"):
        inner_optimizer(choice, both, dict(other.named_parameters()))
    (finding,) = validate(model, both)
    assert finding.level == "error" and finding.where == "2.bias"
    foreign = torch.optim.SGD([*model[2].parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    (finding,) = validate(model, (both[0], foreign))
    assert finding.level == "warning" and "1 of its 5 parameters" in finding.problem


def without_lr():
    model = student()
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    del optimizer.param_groups[1]["lr"]
    return model, optimizer


def without_number():
    model = student()
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    optimizer.param_groups[1]["lr"] = None
    return model, optimizer


def adafactor():
    model = student()
    return model, Adafactor([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])


@pytest.mark.parametrize("build", [without_lr, without_number, adafactor])
def test_a_group_without_a_learning_rate(build):
    model, optimizer = build()
    params, kind = dict(model.named_parameters()), type(optimizer).__name__
    found = "no 'lr'" if build is without_lr else "lr=None"
    words = rf"group 1 of {kind} has {found}, .*set one .*torchopt GradientTransformation as inner="
    with pytest.raises(MetaKDError, match=words):
        inner_optimizer("sgd", optimizer, params)
    with pytest.raises(MetaKDError, match="cannot follow Adafactor" if build is adafactor else words):
        inner_optimizer("mirror", optimizer, params)
    inner = inner_optimizer(torchopt.sgd(lr=0.5), optimizer, params)
    moved, _ = apply(inner.transformation, params, inner.state, params)
    torch.testing.assert_close(moved["2.bias"], 0.5 * params["2.bias"])
    last = validate(model, optimizer)[-1] if build is not adafactor else validate(model, optimizer)[0]
    assert (last.level, last.where) == ("note", f"group(s) 1 of the optimizer ({kind})")
    assert "not a number" in last.problem and "Set a number" in last.cure
    inner_optimizer("sgd", optimizer, {name: p for name, p in params.items() if name.startswith("0")})


def test_learning_rates():
    assert learning_rate({"lr": 0.5}) == learning_rate({"lr": torch.tensor([0.5])}) == 0.5
    assert learning_rate({"lr": None}) is learning_rate({"lr": "auto"}) is learning_rate({}) is None
    model = student()
    first, second = by_dimension(model)
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0)
    (finding,) = validate(model, (first, second))
    assert "its learning rate is 0" in finding.problem
    first.param_groups[0]["lr"] = 0.1
    (finding,) = validate(model, (first, second))
    assert finding.where == "group(s) 1, 2 of the optimizer"


def test_what_no_mirror_follows_is_said_once_an_optimizer():
    model = student()
    both = by_dimension(model, torch.optim.AdamW, torch.optim.Rprop)
    (finding,) = validate(model, both)
    assert finding.where == "the optimizer (Rprop)" and "cannot follow Rprop" in finding.problem
    with pytest.raises(MetaKDError, match="cannot follow Rprop"):
        mirror(both, dict(model.named_parameters()))
    mirror(both, {"0.weight": model[0].weight})
