"""Terms and meta losses that read more than outputs: what a pass left behind, layers of the student."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import check_hypergradient, estimators
from metakd.terms import CrossEntropy
from tests.cases.layers import CLASSES, HARD_AND_SMOOTH, WIDTH, body
from tests.cases.real_steps import Setup, assert_right, balanced, data


class Features:
    """Keeps what a layer gave out."""

    def __init__(self, module: nn.Module) -> None:
        self.value = None
        module.register_forward_hook(self)

    def __call__(self, module, inputs, output) -> None:
        self.value = output

    def size(self, outputs: Tensor, batch) -> Tensor:
        return self.value.square().mean(1)


def hooked() -> Setup:
    student = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double()
    return Setup(student, {"hard": CrossEntropy(), "features": Features(student[0]).size})


def hooked_by_closure() -> Setup:
    student, store = nn.Sequential(body(), nn.Linear(WIDTH, CLASSES)).double(), {}
    student[0].register_forward_hook(lambda module, inputs, output: store.update(features=output))
    return Setup(student, {"hard": CrossEntropy(), "features": lambda z, batch: store["features"].square().mean(1)})


class Auxiliary(nn.Module):
    """Leaves a loss of its own as an attribute, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.aux = features.square().mean(1)
        return self.head(features)


def auxiliary() -> Setup:
    student = Auxiliary().double()
    return Setup(student, {"hard": CrossEntropy(), "aux": lambda z, batch: student.aux})


@pytest.mark.parametrize("build", [hooked, hooked_by_closure, auxiliary])
@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint(), estimators.OneStep("reverse")])
def test_terms_that_read_what_the_pass_left_behind(build, estimator):
    balancer = assert_right(build, estimator=estimator)
    assert balancer.report.influence[:, 1].abs().min() > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_the_pass_left_behind_is_the_real_ones_with_its_graph(accumulate):
    student = Auxiliary().double()
    balancer = balanced(Setup(student, HARD_AND_SMOOTH), accumulate=accumulate)
    batch, meta_batch = data()
    loss = balancer(batch, meta_batch) + 0.5 * student.aux.mean()
    loss.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    losses = torch.stack([term(student(batch.inputs), batch) for term in HARD_AND_SMOOTH.values()], dim=1)
    ((balancer.report.weights * losses).sum(1).mean() + 0.5 * student.aux.mean()).backward()
    for one, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def own_head() -> Setup:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    student = Split().double()

    def term(features: Tensor, batch) -> Tensor:
        return F.cross_entropy(student.head(features), batch.targets, reduction="none")

    return Setup(student, {"hard": term, "size": lambda z, batch: z.square().mean(1)}, term)


@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Unroll(), estimators.FiniteDifference()])
def test_terms_that_call_the_students_own_layers(estimator):
    loose = isinstance(estimator, estimators.FiniteDifference)
    balancer = assert_right(own_head, 1e-4 if loose else 1e-6, estimator=estimator)
    check_hypergradient(balancer, [data()[0]], data()[1], tolerance=1e-4 if loose else 1e-6)
