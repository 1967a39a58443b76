"""The example on learned covariances: its estimators, its optimum, its bound, its record."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "constrained_covariances.py"


@pytest.fixture
def example():
    before = torch.get_default_dtype()
    yield runpy.run_path(str(EXAMPLE))
    torch.set_default_dtype(before)


def tiny(example, count=2, length=6):
    return example["simulate"](count, length, torch.Generator().manual_seed(1))


def test_gauss_newton_finds_the_optimum(example):
    truth, y = tiny(example)
    x, factor = example["solve"](y, example["TRUE"])
    x.requires_grad_()
    residual = example["measured"](example["pairs_of"](x)) - y
    information = torch.linalg.inv(example["covariance"](example["TRUE"]))
    cost = (residual @ information * residual).sum() / 2
    (gradient,) = torch.autograd.grad(cost, x)
    assert gradient.abs().max() < 1e-6 * information.abs().max() * residual.abs().max()
    assert example["error"](x, truth) < example["error"](y[..., 3:6], truth)
    jacobian = torch.autograd.functional.jacobian(lambda x: example["measured"](example["pairs_of"](x)), x.detach())
    weighted = torch.einsum("ntmabc,mk->ntkabc", jacobian, information)
    matrix = torch.einsum("ntkabc,ntkdef->abcdef", weighted, jacobian)[0, :, :, 0].reshape(18, 18)
    torch.testing.assert_close(factor[0] @ factor[0].mT, matrix)


def test_without_noise_it_finds_the_truth(example):
    truth, _ = tiny(example)
    x, _ = example["solve"](example["measured"](example["pairs_of"](truth)), example["WRONG"])
    torch.testing.assert_close(x, truth)


@pytest.mark.slow
def test_the_estimators_agree_with_finite_differences(example):
    errors = example["agreement"](*tiny(example), steps=25)
    assert max(errors[name] for name in ("Implicit", "Unroll", "Adjoint")) < 1e-7
    assert errors["FiniteDifference"] < 1e-5


def test_the_bound_holds_however_far_the_steps_go(example):
    bounded, free = example["MAPS"]["bounded"], torch.randn(20, 3, 3) * torch.logspace(-1, 4, 20)[:, None, None]
    found = torch.linalg.eigvalsh(bounded(free))
    assert found.min() > 1e-5 * (1 - 1e-6) and found.max() / found.min() <= example["KAPPA"] * (1 + 1e-6)
    for name, wrong in example["WRONG"].items():
        for constrain in example["MAPS"].values():
            torch.testing.assert_close(constrain(constrain.right_inverse(wrong)), wrong)
        torch.testing.assert_close(
            wrong / example["TRUE"][name].where(wrong != 0, 1.0), wrong.sign().abs() * ratio(name)
        )


def ratio(name):
    return 100.0 if name == "odometry" else 0.01


def test_learning_lowers_the_error(example):
    _, history = example["learn"](*tiny(example, count=4, length=12), example["MAPS"]["bounded"], 8)
    assert history[-1][0] < 0.95 * history[0][0]
    assert max(condition for _, condition in history) <= example["KAPPA"]


def test_the_record_and_the_plot(example, tmp_path, monkeypatch, capsys):
    main = example["main"]
    small = {
        "run": lambda seed: example["run"](seed, steps=2, count=2, length=6),
        "agreement": lambda *_: {"Unroll": 0.0},
    }
    for name, function in small.items():
        monkeypatch.setitem(main.__globals__, name, function)
    monkeypatch.setattr(sys, "argv", ["examples/constrained_covariances.py", "--seeds", "2", "--output", str(tmp_path)])
    main()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["seeds"] == len(record["runs"]) == 2
    assert set(record["runs"][0]["test_error"]) == {"true", "wrong", "bounded", "unbounded"}
    assert (tmp_path / "covariances.png").stat().st_size > 10_000
    assert "claim" in capsys.readouterr().out
