"""What an estimator answers is detached and fits the problem, however it came by it."""

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, Hypergradient, MetaKDError
from metakd.estimators import FiniteDifference, OneStep
from metakd.terms import CrossEntropy


def balanced(estimator, **options):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    terms = [CrossEntropy(), CrossEntropy(label_smoothing=0.3)]
    return BilevelLossBalancer(student, terms, optimizer=optimizer, estimator=estimator, **options)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 3) for _ in range(2)]


def answering(**changes):
    """An estimator that is right but for what changes."""
    return lambda problem: OneStep()(problem)._replace(**changes)


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (lambda problem: None, "the estimator returned NoneType, expected metakd.Hypergradient"),
        (lambda problem: tuple(OneStep()(problem)), "the estimator returned tuple"),
        (answering(gradient={"w": torch.ones(6, 2)}), "names and shapes {'w': (6, 2)}"),
        (answering(gradient={"weights": torch.ones(2, 6)}), "{'weights': (2, 6)}, expected those of"),
        (answering(gradient={"weights": None}), "{'weights': 'NoneType'}"),
        (answering(gradient={"weights": torch.full((6, 2), torch.nan)}), "12 NaN or infinite entries of 12"),
    ],
)
def test_an_answer_that_does_not_fit(estimator, words):
    balancer = balanced(estimator, accumulate=2)
    before = balancer.state_dict()
    with pytest.raises(MetaKDError) as caught:
        balancer(*batches())
    assert words in str(caught.value)
    assert str(balancer.state_dict()) == str(before)


def test_what_has_a_graph_is_detached():
    def with_graph(problem):
        found, graph = OneStep()(problem), torch.ones((), requires_grad=True)
        gradient = {name: graph * g for name, g in found.gradient.items()}
        return Hypergradient(graph * found.outer_loss, gradient, found.params, found.optimizer_state)

    balancer = balanced(with_graph)
    balancer(*batches())
    assert not balancer.report.meta_loss.requires_grad and not balancer.report.influence.requires_grad


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_estimator_may_ask_twice_for_what_the_training_pass_knows(accumulate):
    """Where the weight model does not move, the graph of the training pass is let go after the first time."""

    def mean_of_two(problem):
        a, b = OneStep()(problem), FiniteDifference()(problem)
        return a._replace(gradient={name: (g + b.gradient[name]) / 2 for name, g in a.gradient.items()})

    found = []
    for estimator in (OneStep(), mean_of_two):
        balancer = balanced(estimator, accumulate=accumulate)
        balancer(*batches()).backward()
        found.append((balancer.report.influence, *(p.grad for p in balancer.student.parameters())))
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-4)
