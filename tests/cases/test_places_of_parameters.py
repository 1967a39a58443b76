"""Parameters in several places, and caches of what was computed from them: right, or refused by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from metakd import MetaKDError, estimators, validate
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH, body
from tests.cases.real_steps import Setup, assert_right, balanced, data


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.first = self.body[0]
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.first(x)[:, :CLASSES]


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.stack = nn.Sequential(layer, self.norm, nn.Tanh(), layer, self.norm, nn.Tanh())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x))


class KeptInAList(nn.Module):
    """Reads its parameters from a list, a dict and an attribute beside the module's own places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)
        self.decayed = [self.body[0].weight, self.head.weight]
        self.by_name = {"bias": self.body[0].bias}

    def forward(self, x: Tensor) -> Tensor:
        size = sum(p.square().sum() for p in self.decayed) + self.by_name["bias"].square().sum()
        return self.head(self.body(x)) * (1 + 0.1 * size)


@pytest.mark.parametrize("student", [TwoNames, UsedTwice, KeptInAList])
def test_a_parameter_with_several_places(student):
    balancer = assert_right(lambda: Setup(student().double(), HARD_AND_SMOOTH))
    for name, p in balancer.student.named_parameters():
        assert isinstance(p, nn.Parameter), name


def test_a_submodule_with_two_names_goes_on_training():
    student = TwoNames().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH))
    batch, meta_batch = data()
    before = student.first.weight.detach().clone()
    for _ in range(2):
        loss = balancer(batch, meta_batch)
        balancer.optimizer.zero_grad()
        loss.backward()
        balancer.optimizer.step()
    assert isinstance(student.first.weight, nn.Parameter) and student.first.weight is student.body[0].weight
    assert not torch.equal(student.first.weight, before)
    assert not any("frozen" in str(finding) for finding in validate(student))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class OwnCache(nn.Module):
    """Computes a matrix once and keeps it until its owner says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.head, self.cache = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, CLASSES), {}

    def forward(self, x: Tensor) -> Tensor:
        if "matrix" not in self.cache:
            self.cache["matrix"] = torch.tanh(self.free)
        return self.head(torch.tanh(x @ self.cache["matrix"]))


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint(), estimators.Unroll()])
def test_inside_a_cache_of_parametrizations(estimator):
    torch.manual_seed(1)
    students = [Parametrized().double()]
    students.append(Parametrized().double())
    students[1].load_state_dict(students[0].state_dict())
    batch, meta_batch = data()
    influences = []
    for student, inside in zip(students, (False, True), strict=True):
        balancer = balanced(Setup(student, HARD_AND_SMOOTH), estimator=estimator)
        if inside:
            with parametrize.cached():
                student(batch.inputs)
                loss = balancer(batch, meta_batch)
                loss.backward()
        else:
            balancer(batch, meta_batch).backward()
        influences.append(balancer.report.influence)
    torch.testing.assert_close(*influences)


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.OneStep("reverse"), estimators.Adjoint()])
def test_a_cache_that_only_the_loop_empties_is_refused(estimator):
    balancer = balanced(Setup(OwnCache().double(), HARD_AND_SMOOTH), estimator=estimator)
    with pytest.raises(MetaKDError, match="a cache of values computed from the parameters"):
        balancer(*data())
    assert balancer.student.cache == {}


class Keyed(nn.Module):
    """Scales its outputs by a number that it looks up by a parameter, or by what stands for that."""

    def __init__(self, key, missing=None) -> None:
        super().__init__()
        self.head, self.key, self.missing = nn.Linear(4, CLASSES), key, missing
        self.scales, self.known = {key(self.head.weight): 2.0}, {self.head.bias}

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(self.head.weight)
        scale = self.scales[key] if self.missing is None else self.scales.get(key, self.missing)
        return self.head(x) * (scale if self.head.bias in self.known else 1.0)


def test_dicts_keyed_by_a_parameter_are_right_and_by_its_id_refused():
    assert_right(lambda: Setup(Keyed(lambda p: p).double(), HARD_AND_SMOOTH))
    for missing in (None, 1.0):
        balancer = balanced(Setup(Keyed(id, missing).double(), HARD_AND_SMOOTH))
        with pytest.raises(MetaKDError, match=r"key dicts by (the|a) parameter or its name.*id\(parameter\)"):
            balancer(*data())
