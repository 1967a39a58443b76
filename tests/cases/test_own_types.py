"""Outputs and inputs of a type of their own: it is kept, in the check and with students in half precision."""

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakd import Batch, BilevelLossBalancer, check_hypergradient, estimators
from metakd.terms import CrossEntropy, SoftTarget
from metakd.weighting import TermScalars
from tests.cases.real_optimizers import assert_right, balanced, mlp, seeded, sgd
from tests.cases.real_steps import data


class Output(OrderedDict):
    """As the outputs of Hugging Face's models: a mapping whose items are attributes as well."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        for name, item in items.items():
            super().__setattr__(name, item)


class Graphs:
    """As the batches of libraries for graphs: no container, only attributes."""

    __slots__ = ("edges", "features")

    def __init__(self, features: Tensor, edges: Tensor) -> None:
        self.features, self.edges = features, edges


class Speaking(nn.Module):
    """Answers with an `Output`, or with the class of such outputs that it is given."""

    def __init__(self, kind: Any = Output) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return self.kind(logits=z, hidden_states=(z.tanh(), z.sin()))


def kinds_of_output() -> list[Any]:
    try:
        from transformers.modeling_outputs import SequenceClassifierOutput
    except ImportError:
        return [Output]
    return [Output, SequenceClassifierOutput]


def typed_terms(kind: Any) -> dict[str, Any]:
    def soft(outputs: Any, batch: Batch) -> Tensor:
        assert type(outputs) is kind and type(batch.teacher) is kind
        assert batch.teacher["logits"] is batch.teacher.logits
        return SoftTarget(temperature=2.0)(outputs, batch)

    def hint(outputs: Any, batch: Batch) -> Tensor:
        states = zip(outputs.hidden_states, batch.teacher.hidden_states, strict=True)
        return sum((mine - other).square().mean(1) for mine, other in states)

    return {"hard": CrossEntropy(), "soft": soft, "hint": hint}


def speaking(kind: Any, dtype: torch.dtype) -> tuple[BilevelLossBalancer, list[Batch]]:
    student, teacher = seeded(lambda: Speaking(kind), dtype), Speaking(kind).to(dtype)
    batches = [batch._replace(inputs=batch.inputs.to(dtype)) for batch in data()]
    weighting = TermScalars(3)
    balancer = BilevelLossBalancer(
        student,
        typed_terms(kind),
        optimizer=torch.optim.SGD(student.parameters(), lr=0.2),
        teacher=teacher,
        weighting=weighting,
        weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
        meta_loss=typed_terms(kind)["soft"],
    )
    return balancer, batches


@pytest.mark.parametrize("kind", kinds_of_output())
def test_outputs_keep_their_type_in_the_check(kind):
    balancer, (batch, meta_batch) = speaking(kind, torch.float32)
    balancer(batch, meta_batch)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    assert check_hypergradient(
        balancer, [batch, meta_batch], meta_batch, estimator=estimators.Adjoint()
    ).verdict.startswith("exact")


@pytest.mark.parametrize("kind", kinds_of_output())
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_outputs_keep_their_type_with_a_student_in_half_precision(kind, half):
    balancer, (batch, meta_batch) = speaking(kind, half)
    exact, _ = speaking(kind, torch.float32)
    exact.student.load_state_dict(balancer.student.state_dict())
    exact.teacher.load_state_dict(balancer.teacher.state_dict())
    for each in (balancer, exact):
        own = next(each.student.parameters()).dtype
        each(*(b._replace(inputs=b.inputs.to(own)) for b in (batch, meta_batch)))
    found, expected = balancer.report.influence, exact.report.influence
    assert (found - expected).norm() < 0.03 * expected.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.meta_step([batch], meta_batch)
        hypergradients = [each.weighting.free.grad.clone() for each in (balancer,)]
    exact.meta_step(
        [batch._replace(inputs=batch.inputs.float())], meta_batch._replace(inputs=meta_batch.inputs.float())
    )
    torch.testing.assert_close(hypergradients[0], exact.weighting.free.grad, rtol=0.03, atol=1e-4)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


class OnGraphs(nn.Module):
    """Sums over neighbours; a sample is a node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, graphs: Graphs) -> Tensor:
        h = torch.tanh(self.first(graphs.features))
        source, target = graphs.edges
        return self.second(h.index_add(0, target, h[source]))


def graphs(dtype: torch.dtype) -> tuple[Batch, Batch]:
    def graph(batch: Batch) -> Batch:
        n = len(batch.targets)
        edges = torch.stack([torch.arange(n), torch.arange(n).roll(2)])
        return Batch(Graphs(batch.inputs.to(dtype), edges), batch.targets)

    batch, meta_batch = data()
    return graph(batch), graph(meta_batch)


def test_inputs_of_a_type_of_their_own():
    batch, meta_batch = graphs(torch.float64)
    assert_right(lambda: sgd(seeded(OnGraphs)), given=([batch], meta_batch))
    assert_right(lambda: sgd(seeded(OnGraphs)), 2, given=([batch, meta_batch], meta_batch))
    balancer, (batch, meta_batch) = balanced(sgd(seeded(OnGraphs, torch.float32))), graphs(torch.float32)
    for batches in ([batch], [batch, batch]):
        found = check_hypergradient(balancer, batches, meta_batch, estimator=estimators.Adjoint())
        assert found.verdict.startswith("exact")
    assert batch.inputs.features.dtype == torch.float32
