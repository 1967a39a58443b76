"""What may be a teacher, and that it runs in eval mode, without gradients and without a trace."""

import copy
import warnings
from collections import UserList
from functools import partial

import pytest
import torch
from torch import nn

from metakd import MetaKDError
from metakd._call.arguments import check_teacher
from metakd._virtual.teacher import in_eval_mode, teacher_outputs

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def reference():
    return network().eval()(X).detach()


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.script(module)


def frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(scripted(network().eval()))


def exported():
    size = {0: torch.export.Dim("batch", min=2)}
    return torch.export.export(network().eval(), (X,), dynamic_shapes=(size,), strict=False).module()


class Named(nn.Module):
    """A classifier with another method than forward."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def scores(self, x):
        return self.layers(x)


KINDS = {
    "module": network,
    "in data parallel": lambda: nn.DataParallel(network()),
    "function": lambda: partial(_apply, network().eval()),
    "method": lambda: Named().scores,
    "scripted": lambda: scripted(network()),
    "frozen": frozen,
    "exported": exported,
    "compiled": lambda: torch.compile(network(), backend="eager"),
}


def _apply(module, x):
    return module(x)


@pytest.mark.parametrize("kind", KINDS)
def test_anything_that_can_be_called(kind):
    teacher = KINDS[kind]()
    check_teacher(teacher)
    found = teacher_outputs(teacher, X)
    assert not found.requires_grad
    torch.testing.assert_close(found, reference())


@pytest.mark.parametrize("together", [list, tuple, UserList, nn.ModuleList])
def test_an_ensemble_gives_the_list_of_its_outputs(together):
    teachers = together([network(), exported()] + [torch.relu] * (together is not nn.ModuleList))
    check_teacher(teachers)
    found = teacher_outputs(teachers, X)
    assert type(found) is list and len(found) == len(teachers)
    for outputs, expected in zip(found, [reference(), reference(), X.relu()], strict=False):
        torch.testing.assert_close(outputs, expected)
    assert teachers[0].training and teachers[0][1].num_batches_tracked == 0


def test_inputs_are_given_as_the_student_gets_them():
    assert teacher_outputs(lambda a, b: (a, b), (1, 2)) == (1, 2)
    assert teacher_outputs([lambda **named: named], {"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("kind", ["module", "scripted", "frozen", "exported"])
def test_every_part_has_its_mode_again(kind):
    teacher = KINDS[kind]()
    parts = [part for part in teacher.modules() if hasattr(part, "training")]
    for part in parts[1:2]:
        part.training = not part.training
    modes, state = [part.training for part in parts], copy.deepcopy(dict(teacher.state_dict()))
    teacher_outputs(teacher, X)
    assert [part for part in teacher.modules() if hasattr(part, "training")] == parts
    assert [part.training for part in parts] == modes
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_modes_come_back_after_an_error():
    teacher = network()
    with pytest.raises(MetaKDError, match=r"teacher 1: Linear cannot be called: .*float64.*|teacher 1"):
        teacher_outputs([torch.relu, teacher], X.double())
    assert all(part.training for part in teacher.modules())


class Merging(nn.Module):
    """Merges two weights when it changes to eval mode, and takes them apart when it changes back."""

    def __init__(self):
        super().__init__()
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return x + self.merged


def test_a_modules_own_change_of_mode_is_undone():
    teacher = Merging()
    assert teacher_outputs(teacher, torch.zeros(1)).item() == 1.0
    assert not teacher.merged and teacher.training
    with in_eval_mode(teacher.eval()):
        assert teacher.merged
    assert teacher.merged and not teacher.training


class Exported(Merging):
    """Refuses to change its mode, as exported modules do."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def train(self, mode=True):
        raise NotImplementedError

    def forward(self, x):
        return self.dropout(x)


def test_a_module_that_refuses_to_change_its_mode():
    teacher = Exported()
    torch.testing.assert_close(teacher_outputs(teacher, torch.ones(99)), torch.ones(99))
    assert teacher.training and teacher.dropout.training


class NoForward(nn.Module):
    pass


REFUSED = {
    "text": (
        "resnet56",
        r"^teacher is of type str; a teacher is an nn\.Module or any other callable .* sequence of these",
    ),
    "class": (nn.Linear, r"^teacher is the class Linear, not an object of it; write Linear\(\.\.\.\)"),
    "mapping": ({"a": nn.Linear(1, 1)}, r"^teacher is of type dict; a teacher is"),
    "modules by name": (nn.ModuleDict({"a": nn.Linear(1, 1)}), r"^teacher is of type ModuleDict; a teacher is"),
    "number": (3, r"^teacher is of type int"),
    "set": ({nn.Linear(1, 1)}, r"^teacher is of type set"),
    "iterator": ((m for m in [nn.Linear(1, 1)]), r"^teacher is of type generator"),
    "module without forward": (NoForward(), r"^teacher is of type NoForward"),
    "none in a list": ([nn.Linear(1, 1), None], r"^teacher\[1\] is of type NoneType"),
    "class in a list": ([nn.Linear], r"^teacher\[0\] is the class Linear"),
    "list in a list": ([[nn.Linear(1, 1)]], r"^teacher\[0\] is of type list"),
    "nobody": ([], r"^teacher is an empty list, a teacher is"),
    "state": (nn.Linear(1, 1).state_dict(), r"^teacher is of type OrderedDict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_teacher(case):
    teacher, words = REFUSED[case]
    with pytest.raises(MetaKDError, match=words):
        check_teacher(teacher)


def test_an_exported_program_has_a_module():
    program = torch.export.export(network().eval(), (X,))
    for teacher, name in ((program, r"^teacher"), ([torch.relu, program], r"^teacher\[1\]")):
        with pytest.raises(MetaKDError, match=name + r" is an ExportedProgram.*program\.module\(\)"):
            check_teacher(teacher)
    check_teacher(program.module())
    check_teacher(None)
