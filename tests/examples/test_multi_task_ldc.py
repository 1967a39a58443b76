"""The LDC-MTL example: its formulas against closed forms, its hypergradient, and a tiny run's files."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torchopt
from PIL import Image

from metakd import Batch, hypergradient
from metakd.terms import evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_task_ldc.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def problem(tasks):
    random = torch.Generator().manual_seed(tasks)
    losses, free = torch.randn(2, 7, tasks, generator=random, dtype=torch.float64)
    return losses.requires_grad_(), free.requires_grad_()


def test_the_penalty_is_the_weighted_sum_plus_the_gaps(example):
    losses, free = problem(4)
    for found, loss, row in zip(example["single_loop"](losses, free, 0.1), losses, free, strict=True):
        weighted = list((row.exp() / row.exp().sum() * loss).unbind())
        gaps = sum(abs(weighted[i] - weighted[i + 1]) for i in range(3))
        torch.testing.assert_close(found, sum(weighted) + 0.1 * gaps)


def test_two_tasks_and_lambda_one_make_twice_the_larger_weighted_loss(example):
    losses, free = problem(2)
    found = torch.autograd.grad(example["single_loop"](losses, free, 1.0).sum(), [losses, free])
    expected = torch.autograd.grad(2 * (free.softmax(-1) * losses).amax(-1).sum(), [losses, free])
    torch.testing.assert_close(found, expected)


def test_its_gradient_in_the_losses_is_the_closed_form(example):
    losses, free = problem(3)
    (found,) = torch.autograd.grad(example["single_loop"](losses, free, 0.3).sum(), [losses])
    w = free.softmax(-1).detach()
    first, second = ((w * losses)[:, i + 1].sub((w * losses)[:, i]).sign().detach() for i in range(2))
    torch.testing.assert_close(found, w * (1 + 0.3 * torch.stack([-first, first - second, second], 1)))


def test_the_upper_hypergradient_is_autograd_through_the_step(example):
    toy, discrepancy = example["toy"], example["discrepancy"]
    x, free = torch.tensor([[2.0, -3.0], [-4.0, -1.0]]), torch.tensor([[0.3, -0.2], [0.0, 1.0]])

    def inner(params, weights, batch):
        return (weights["free"].softmax(-1) * toy(params["x"])).sum()

    def outer(params, weights):
        return discrepancy(toy(params["x"]), weights["free"]).sum()

    found = hypergradient(inner, outer, {"x": x}, {"free": free}, [None], optimizer=torchopt.sgd(lr=0.5))
    x, free = x.requires_grad_(), free.requires_grad_()
    (gradient,) = torch.autograd.grad(inner({"x": x}, {"free": free}, None), x, create_graph=True)
    (expected,) = torch.autograd.grad(outer({"x": x - 0.5 * gradient}, {"free": free}), free)
    torch.testing.assert_close(found.gradient["free"], expected)
    (direct,) = torch.autograd.grad(outer({"x": (x - 0.5 * gradient).detach()}, {"free": free}), free)
    assert (expected - direct).norm() > 0.01 * expected.norm()  # the step's part is not lost in rounding


def test_the_toy_has_its_known_values_and_no_step_mixes_points(example):
    at = torch.tensor([(7.0, -8.0), (-7.0, -8.0), (0.0, -8.0)])
    shrunk = torch.tanh(torch.tensor(4.0)) * torch.tensor([0.1, 1.0])
    torch.testing.assert_close(example["toy"](at), torch.tensor([(-20, -0.4), (-0.4, -20), (-15.1, -15.1)]) * shrunk)
    x = torch.randn(5, 2, requires_grad=True)
    (together,) = torch.autograd.grad(example["toy"](x).sum(), x)
    for row, point in zip(together, x, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(example["toy"](point).sum(), x)[0].sum(0))


def test_an_endpoint_is_where_most_end(example):
    ends = torch.tensor([(7.0, -8.0)] + [(0.0, -8.0)] * 5)
    found = example["endpoint"](ends[None])
    assert (found["of_5"], found["of_64"]) == (4, 5)
    assert found["percent_of_best"] == pytest.approx([75.45, 75.45], abs=0.1)


def test_the_sum_of_logs_and_its_gradient_are_those_of_the_batch_means(example):
    outputs, targets = torch.randn(9, 44, requires_grad=True), torch.rand(9, 35)
    batch = Batch(None, targets)
    found = example["SumOfLogs"](example["TASKS"])(outputs, batch).mean()
    expected = evaluate(example["TASKS"], outputs, batch).mean(0).log().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, outputs)[0] for value in (found, expected)))


def test_torchjds_balancers_start_at_their_formulas(example):
    pytest.importorskip("torchjd")
    losses = problem(4)[0][0].exp().detach().float().requires_grad_()
    made = {name: method[0]() for name, method in example["METHODS"].items() if method}
    torch.testing.assert_close(made["DWA"](losses), losses.sum())
    torch.testing.assert_close(made["IMTL-L 0.01"](losses), losses.sum())
    torch.testing.assert_close(made["uncertainty 0.01"](losses), losses.sum() / 2)
    assert losses.min() < made["random weights"](losses) < losses.max()
    (found,) = torch.autograd.grad(made["FAMO"](losses), losses)
    torch.testing.assert_close(found, 1 / losses / (1 / losses).sum())


@pytest.mark.slow
@pytest.mark.parametrize("torchjd", [True, False])
def test_a_tiny_run_writes_what_it_prints(tmp_path, monkeypatch, capsys, torchjd):
    if torchjd:
        pytest.importorskip("torchjd")
    else:
        monkeypatch.setitem(sys.modules, "torchjd", None)
    output = tmp_path / "ldc"
    arguments = ["--seeds", "2", "--steps", "6", "--toy-steps", "60", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((output / "results.json").read_text()), capsys.readouterr().out
    assert {"command", "versions", "hardware", "threads"} <= record.keys()
    assert record["seeds"] == 2 and record["time_over_plain_sum"]["plain sum"] == 1.0
    assert ("pip install" in printed) is not torchjd
    assert ("FAMO" in record["delta_m"]) is torchjd
    assert {"plain sum", "LDC-MTL 0.1", "metakd, held out", "metakd"} <= record["delta_m"].keys()
    for name, end in record["toy"].items():
        assert f"{name:12} {end['of_5']} of 5 starts" in printed
    for name, deltas in record["delta_m"].items():
        assert f"{name:17} Delta_m {sum(deltas) / 2:6.1f}" in printed
        pairs = zip(record["errors"][name], record["alone"], deltas, strict=True)
        for errors, alone, delta in pairs:
            assert delta == pytest.approx(
                sum(100 * (e / a - 1) for e, a in zip(errors, alone, strict=True)) / 4, rel=1e-3
            )
    with Image.open(output / "multi_task_ldc.png") as image:
        assert image.size[0] > 1000
