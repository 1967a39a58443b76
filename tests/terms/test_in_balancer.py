"""The long-tailed terms inside the balancer: exact hypergradients, with the teacher that the balancer runs."""

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, check_hypergradient, estimators, terms

COUNTS = [50, 20, 9, 3]


def long_tailed_terms():
    return [
        terms.BalancedSoftmax(COUNTS),
        terms.SoftTarget(3.0, power=0.5),
        terms.RebalancedSoftTarget(COUNTS),
        terms.TargetClass(),
        terms.NonTargetClass(),
        terms.GroupTarget(COUNTS),
        terms.WithinGroupTarget(COUNTS),
    ]


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def data(rows):
    return torch.randn(rows, 5, dtype=torch.float64), torch.randint(4, (rows,))


def build(these, estimator):
    torch.manual_seed(1)
    student, teacher = network(), network()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return BilevelLossBalancer(student, these, optimizer=optimizer, teacher=teacher, estimator=estimator)


@pytest.mark.parametrize("steps", [1, 2])
def test_hypergradients_agree_with_finite_differences(steps):
    estimator = estimators.OneStep() if steps == 1 else estimators.Adjoint()
    balancer = build(long_tailed_terms(), estimator)
    check_hypergradient(balancer, [data(6) for _ in range(steps)], data(8))


def test_one_step_through_the_gate_is_exact():
    check_hypergradient(
        build([*long_tailed_terms(), terms.GatedSoftTarget()], estimators.OneStep()), [data(6)], data(8)
    )


def test_forward_and_reverse_mode_agree():
    found = []
    batch, meta_batch = data(6), data(8)
    for mode in ("forward", "reverse"):
        balancer = build([*long_tailed_terms(), terms.GatedSoftTarget()], estimators.OneStep(mode))
        balancer(batch, meta_batch)
        assert balancer.report.losses.shape == (6, 8)
        found.append(torch.cat([p.grad.flatten() for p in balancer.weighting.parameters()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)
