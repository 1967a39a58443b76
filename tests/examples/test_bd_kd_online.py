"""The BD-KD example and its online teacher: exact gradients of both networks, the noise, and a tiny run's files."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from metakd import Batch, BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget

EXAMPLE = Path(__file__).parents[2] / "examples" / "bd_kd_online.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def kl(p, q):
    return (p * (p.log() - q.log())).sum(1)


def entropy(p):
    return -(p * p.log()).sum(1)


@pytest.mark.parametrize("method", ["dml", "dml x3", "bd_kd", "swapped", "ungated"])
def test_a_student_minimises_its_formula(example, method):
    torch.manual_seed(0)
    z, z_teacher, labels = 2 * torch.randn(40, 10), torch.randn(40, 10), torch.randint(10, (40,))
    student = nn.Linear(10, 10)
    parts = example["weighting_of"](method)
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(4.0), "reverse": example["ReverseSoftTarget"](4.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=torch.optim.SGD(student.parameters(), lr=0.1), **parts)
    outputs = student(z)
    q, p = (outputs / 4).softmax(1), (z_teacher / 4).softmax(1)
    uncertain = entropy(outputs.softmax(1)) > entropy(z_teacher.softmax(1))
    assert 0 < uncertain.sum() < 40
    nu, delta = {
        "dml": (1.0, 0.0),
        "dml x3": (3.0, 0.0),
        "bd_kd": (2.0 - uncertain.float(), 1.0 + uncertain.float()),
        "swapped": (1.0 + uncertain.float(), 2.0 - uncertain.float()),
        "ungated": (1.5, 1.5),
    }[method]
    expected = (F.cross_entropy(outputs, labels, reduction="none") + 16 * (nu * kl(p, q) + delta * kl(q, p))).mean()
    torch.testing.assert_close(balancer.loss(Batch(z, labels, teacher=z_teacher)), expected)


@pytest.mark.parametrize("given", [True, False], ids=["outputs in the batch", "teacher="])
def test_an_online_teacher_gets_its_own_gradient_and_is_read_afresh(given):
    torch.manual_seed(0)
    x, labels = torch.randn(12, 4), torch.randint(3, (12,))
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    upper = torch.optim.SGD(teacher.parameters(), lr=0.5)
    terms = {"hard": CrossEntropy(), "soft": SoftTarget(2.0)}
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher)
    for _ in range(3):
        outputs = teacher(x)
        batch = Batch(x, labels, teacher=outputs if given else None)
        loss = balancer(batch, (x[:6], labels[:6]))
        expected_soft = 4 * kl((outputs / 2).softmax(1), (student(x) / 2).softmax(1))
        torch.testing.assert_close(balancer.report.losses[:, 1], expected_soft.detach())
        own = F.cross_entropy(outputs, labels)
        expected = torch.autograd.grad(own, [*teacher.parameters()], retain_graph=True)
        optimizer.zero_grad(), upper.zero_grad()
        (loss + own).backward()
        torch.testing.assert_close([p.grad for p in teacher.parameters()], list(expected))
        optimizer.step(), upper.step()
        assert teacher.training


def test_the_noise_is_in_the_training_labels_alone(example):
    x, clean = example["noisy_digits"](0, 0.0)
    again, noisy = example["noisy_digits"](0, 0.15)
    assert torch.equal(x, again) and torch.equal(clean[800:], noisy[800:])
    assert (clean != noisy)[:800].float().mean() == pytest.approx(0.15, abs=0.04)
    assert noisy.min() == 0 and noisy.max() == 9


def test_methods_start_from_the_same_networks(example):
    x, y = example["noisy_digits"](0, 0.15)
    args = argparse.Namespace(temperature=4.0, epochs=0)
    first, second = (example["train"](method, x, y, 0, args).state_dict() for method in ("dml", "learned"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_paired_differences_have_the_t_interval(example):
    found = example["paired"]([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])
    half = 4.302653 * np.std([2, 3, 4], ddof=1) / 3**0.5
    assert found == pytest.approx({"mean": 3.0, "low": 3.0 - half, "high": 3.0 + half})


def test_a_tiny_run_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bd_kd"
    arguments = ["--seeds", "2", "--epochs", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((output / "results.json").read_text()), capsys.readouterr().out
    assert {"command", "versions", "hardware", "threads"} <= record.keys()
    for name, run in record["runs"].items():
        for metric, values in run.items():
            assert len(values) == 2
            assert f"{np.mean(values):7.3f}" in printed
            assert record["minus_dml"][name][metric]["mean"] == pytest.approx(
                np.mean(values) - np.mean(record["runs"]["dml"][metric])
            )
    with Image.open(output / "bd_kd.png") as image:
        assert image.size[0] > 1000
