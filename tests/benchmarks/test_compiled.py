"""The passes that `benchmarks/compiled.py` compiles are those of a step, and leave no trace."""

import sys

import pytest
import torch
from torch.func import functional_call

pytest.importorskip("higher")  # of the extra "benchmarks"

from benchmarks import compiled
from tests.benchmarks.problems import task


@pytest.mark.parametrize("case", ["convnet4", "transformer"])
def test_the_passes_are_those_of_a_step(case):
    at = task(case, 1)
    before = {name: value.clone() for name, value in at.student.state_dict().items()}
    passes = compiled.Passes(at, lambda function: function)
    found = {name: take(passes) for name, take in compiled.PASSES.items()}
    assert all(torch.equal(value, before[name]) for name, value in at.student.state_dict().items())

    def losses(step):
        params = {name: p + step * passes.along[name] for name, p in passes.params.items()}
        return at.losses(functional_call(at.student, params, at.batches[0].inputs), at.batches[0])

    differences = (losses(1e-7) - losses(-1e-7)) / 2e-7  # nearer than the next kink of ReLU
    torch.testing.assert_close(found["forward-mode pass"], differences, rtol=1e-5, atol=1e-5)
    for name, loss in (
        ("training pass", lambda: at.losses(at.student(at.batches[0].inputs), at.batches[0]).mean()),
        ("meta pass", lambda: at.outer(at.student(at.meta_batch.inputs))),
    ):
        gradient = torch.autograd.grad(loss(), list(at.student.parameters()))
        torch.testing.assert_close(found[name], torch.cat([g.flatten() for g in gradient]), rtol=1e-9, atol=1e-12)


def test_the_command_prints_times_and_agreement(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: 2 * function(*args))  # wrong on purpose
    monkeypatch.setattr(sys, "argv", ["compiled.py", "--cases", "convnet4", "--passes", "meta pass", "--repeats", "2"])
    compiled.main()
    case, name, milliseconds, ratio, *off = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (case, name) == ("convnet4", "meta pass") and float(milliseconds) > 0 and float(ratio) > 0
    assert float(off[0]) < 1e-3 and float(off[1]) == 1
