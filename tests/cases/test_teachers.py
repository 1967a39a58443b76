"""Teachers: a list, a function, an exported or a frozen scripted module."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakd import Batch, MetaKDError, check_hypergradient
from metakd.terms import CrossEntropy, SoftTarget
from tests.cases.real_optimizers import Case, assert_right, balanced, mlp, plain, seeded, sgd
from tests.cases.real_steps import data


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()


def frozen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are deprecated
        return torch.jit.freeze(torch.jit.script(network().eval()))


def exported() -> Any:
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(network().eval(), (data()[0].inputs,), dynamic_shapes=sizes).module()


def first_soft(outputs: Tensor, batch: Batch) -> Tensor:
    return SoftTarget(temperature=2.0)(outputs, batch._replace(teacher=batch.teacher[0]))


def second_soft(outputs: Tensor, batch: Batch) -> Tensor:
    return SoftTarget(temperature=3.0)(outputs, batch._replace(teacher=batch.teacher[1]))


ONE = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=2.0)}
EACH = {"hard": CrossEntropy(), "first": first_soft, "second": second_soft}


def by_hand(x: Tensor) -> Tensor:
    return network().eval()(x).detach()


def bent(x: Tensor) -> Tensor:
    return x[:, :3].sin()


TEACHERS = {
    "module": (network, by_hand, ONE),
    "function": (lambda: bent, bent, ONE),
    "frozen": (frozen, by_hand, ONE),
    "exported": (exported, by_hand, ONE),
    "list": (lambda: [network(), bent], lambda x: [by_hand(x), bent(x)], EACH),
    "modules": (lambda: nn.ModuleList([network(), network()]), lambda x: [by_hand(x), by_hand(x)], EACH),
    "all kinds": (lambda: (exported(), frozen()), lambda x: [by_hand(x), by_hand(x)], EACH),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_of_any_kind_teaches_right(kind):
    build, answers, terms = TEACHERS[kind]
    known = [b._replace(teacher=answers(b.inputs)) for b in data()]

    def case() -> Case:
        return sgd(seeded(mlp), terms=terms)

    expected = assert_right(case, given=(known[:1], known[1])).report
    balancer = balanced(case(), teacher=build(), features=lambda losses, outputs, batch: losses)
    batch, meta_batch = data()
    balancer(batch, meta_batch)
    torch.testing.assert_close(balancer.report.influence, expected.influence)
    torch.testing.assert_close(balancer.report.losses, expected.losses)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (nn.Linear, r"teacher is the class Linear, not an object of it; write Linear"),
        ("resnet56", r"teacher is of type str; a teacher is an nn\.Module or any other callable"),
        ({"a": nn.Linear(4, 3)}, r"teacher is of type dict; .* sequence of these: an ensemble"),
        ([nn.Linear(4, 3), None], r"teacher\[1\] is of type NoneType"),
        ([], r"teacher is an empty list"),
    ],
)
def test_what_is_no_teacher_is_refused_at_construction(teacher, words):
    with pytest.raises(MetaKDError, match=words):
        plain(nn.Linear(4, 3), ONE, teacher=teacher)


def test_an_exported_program_is_told_to_give_its_module():
    program = torch.export.export(network().eval(), (data()[0].inputs,))
    with pytest.raises(MetaKDError, match=r"teacher is an ExportedProgram, .*program\.module\(\)"):
        plain(nn.Linear(4, 3), ONE, teacher=program)


def test_an_ensemble_where_one_teacher_is_expected():
    balancer, (batch, meta_batch) = plain(seeded(mlp), ONE, teacher=[network(), bent]), data()
    with pytest.raises(MetaKDError, match=r"list of 2 outputs \(an ensemble .*(batch\.teacher|features=)"):
        balancer(batch, meta_batch)
