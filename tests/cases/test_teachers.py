"""Teachers: a list, a function, an exported or a frozen scripted module."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakd import Batch, MetaKDError, check_hypergradient, learned_weights
from metakd.terms import CrossEntropy, FromTeacher, ReverseSoftTarget, SoftTarget
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


class SameMemory(nn.Module):
    """Gives its answers in one tensor, as a captured graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.answer = network(), torch.zeros(0, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        if len(self.answer) != len(x):
            self.answer = torch.zeros(len(x), 3).double()
        return self.answer.copy_(self.net(x))


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
    "same memory": (SameMemory, by_hand, ONE),
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
    pair = {"soft": SoftTarget(), "hard": CrossEntropy()}
    balancer, (batch, meta_batch) = plain(seeded(mlp), pair, teacher=[network(), bent]), data()
    with pytest.raises(MetaKDError, match=r"'soft': .*list of 2 outputs \(an ensemble .*terms\.FromTeacher\(term, 0\)"):
        balancer(batch, meta_batch)


def test_a_term_for_each_teacher_of_an_ensemble():
    teachers = [network().eval(), bent]
    terms = {name: FromTeacher(SoftTarget(2.0), k) for k, name in enumerate(("network", "bent"))}
    balancer, (batch, meta_batch) = plain(seeded(mlp), terms, teacher=teachers), data()
    student = copy.deepcopy(balancer.student)
    balancer(batch, meta_batch)
    alone = Batch(batch.inputs, teacher=None)
    outputs = student(batch.inputs)
    for k, teacher in enumerate(teachers):
        wanted = SoftTarget(2.0)(outputs, alone._replace(teacher=teacher(batch.inputs)))
        torch.testing.assert_close(balancer.report.losses[:, k], wanted.detach())
    known = [
        F.cross_entropy(z, batch.targets, reduction="none") for z in (outputs, *(t(batch.inputs) for t in teachers))
    ]
    learned = learned_weights(balancer, [batch]).features
    torch.testing.assert_close(learned, torch.stack(known, 1).detach().to(learned))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


def test_batches_that_bring_the_teachers_outputs_have_the_same_features_as_a_teacher():
    teacher, (batch, meta_batch) = network().eval(), data()
    three = {"soft": SoftTarget(), "hard": CrossEntropy(), "smooth": CrossEntropy(label_smoothing=0.2)}
    found = []
    for given in (None, teacher):
        balancer = plain(seeded(mlp), three, teacher=given)
        brought = batch if given else batch._replace(teacher=teacher(batch.inputs))
        balancer(brought, meta_batch)
        found.append(learned_weights(balancer, [brought]).features)
    assert found[0].shape[1] == 2
    torch.testing.assert_close(*found)
    ensemble = plain(seeded(mlp), {"first": FromTeacher(SoftTarget(), 0), "hard": CrossEntropy()})
    ensemble(batch._replace(teacher=[teacher(batch.inputs)] * 3), meta_batch)
    assert ensemble.weighting.layers[0].weight.shape[1] == 4
    assert plain(seeded(mlp), {"hard": CrossEntropy()}).weighting.layers[0].weight.shape[1] == 1


def test_without_labels_the_default_features_are_entropies():
    teacher, (batch, meta_batch) = network().eval(), data()
    balancer = plain(seeded(mlp), {"soft": SoftTarget(), "reverse": ReverseSoftTarget()}, teacher=teacher)
    student, seen = copy.deepcopy(balancer.student), []
    balancer.weighting.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    balancer(batch.inputs, meta_batch)
    wanted = [torch.distributions.Categorical(logits=z(batch.inputs)).entropy() for z in (student, teacher)]
    torch.testing.assert_close(seen[0], torch.stack(wanted, 1).detach().to(seen[0]))
