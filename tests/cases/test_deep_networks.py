"""Deep networks at few samples: a kink is told from a fault."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators
from metakd.longtail._torchvision import import_torchvision
from metakd.terms import CrossEntropy
from tests.cases.real_optimizers import (
    Case,
    balanced,
)


def double_backward(balancer: BilevelLossBalancer, batch: Batch, meta_batch: Batch, lr: float) -> Tensor:
    """The gradient in TermScalars' free numbers by a graph of the step."""
    student, free = balancer.student, balancer.weighting.free
    params = dict(student.named_parameters())
    outputs = student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in balancer.terms.values()], dim=1)
    loss = (F.softplus(free) * losses).sum() / len(losses)
    steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(params.items(), steps, strict=True)}
    meta = CrossEntropy()(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
    (found,) = torch.autograd.grad(meta, free)
    return found


DEEP = [("resnet18", 0.01), ("shufflenet_v2_x0_5", 0.1), ("shufflenet_v2_x0_5", 0.01), ("squeezenet1_1", 0.01)]


def deep(name: str, lr: float) -> tuple[BilevelLossBalancer, Batch, Batch]:
    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    student = getattr(models, name)(num_classes=3).double()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    batch, meta_batch = (Batch(x, torch.arange(4) % 3) for x in images)
    return balanced(Case(student, [torch.optim.SGD(student.parameters(), lr=lr)])), batch, meta_batch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), DEEP)
def test_a_deep_network_at_few_samples_is_exact_or_near_a_kink(name, lr):
    balancer, batch, meta_batch = deep(name, lr)
    state = copy.deepcopy(balancer.student.state_dict())
    balancer(batch, meta_batch)
    found = balancer.weighting.free.grad.clone()
    balancer.student.load_state_dict(state)
    torch.testing.assert_close(found, double_backward(balancer, batch, meta_batch, lr), rtol=1e-7, atol=1e-12)
    balancer.student.load_state_dict(state)
    try:
        assert check_hypergradient(balancer, [batch], meta_batch, directions=1).verdict.startswith("exact")
    except MetaKDError as error:
        said = str(error)
        assert "kink" in said and "stop-gradient" not in said and "backward is wrong" not in said
        assert "there is no derivative here" not in said  # there is: a double backward has just given it


class Bent(estimators.OneStep):
    """Wrong by a tenth or two, and not by the same factor everywhere."""

    def __call__(self, problem: Any) -> Any:
        found = super().__call__(problem)
        bent = {key: g * torch.linspace(0.8, 1.1, g.numel()).to(g).view_as(g) for key, g in found.gradient.items()}
        return found._replace(gradient=bent)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), DEEP[1:])
def test_a_fault_in_a_deep_network_is_called_a_fault(name, lr):
    balancer, batch, meta_batch = deep(name, lr)
    with pytest.raises(MetaKDError, match="differs from central finite differences") as caught:
        check_hypergradient(balancer, [batch], meta_batch, estimator=Bent(), directions=2)
    assert "a kink" not in str(caught.value) and "kinks close by" not in str(caught.value)
