"""The benchmark of weights learned through a whole training: the hypergradient, the checkpoint, the command."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("higher")  # of the extra "benchmarks"
pytest.importorskip("sklearn")  # of the extra "examples"

from benchmarks.common import whole
from benchmarks.common.course import GROUP, GROUPS, SAMPLE, Course, rate_at, smoothness
from benchmarks.common.measure import ROOT
from benchmarks.common.small_tasks import student
from metakd import BilevelLossBalancer, check_hypergradient, hypergradient

STEPS = 6


@pytest.fixture(scope="module", params=GROUPS)
def course(request):
    return Course.build(request.param, 0, STEPS).in_float64()


def close(one, other):
    return all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-12) for name in other)


def test_the_hypergradient_agrees_with_finite_differences(course):
    found = check_hypergradient(**course.problem(course.equal), directions=2, tolerance=1e-7)
    assert all(abs(value) > 1e-6 for name in (GROUP, SAMPLE) for value in found.finite_differences[name])


def test_the_steps_are_those_of_the_students_own_optimizer(course):
    model, optimizer = student(0)
    model.double()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at(STEPS, 1.0))
    balancer = BilevelLossBalancer(model, course.task.terms, optimizer=optimizer, weighting=course.weighting)
    for batch in course.batches:
        loss = balancer.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    params, _ = course.trained(course.equal)
    assert close(dict(model.named_parameters()), params)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert close(hypergradient(**course.problem(course.equal)).params, params)


def test_from_a_checkpoint_only_later_weights_have_a_gradient_and_it_is_the_same(course):
    everything = hypergradient(**course.problem(course.equal))
    checkpoint = course.until(4).trained(course.equal)
    later = hypergradient(**course.problem(course.equal, 4, checkpoint))
    pieces = later.gradient[GROUP].view(3, -1)
    assert close(later.params, everything.params) and not pieces[:2].any() and pieces[2].any()
    assert torch.allclose(pieces[2], everything.gradient[GROUP].view(3, -1)[2])


def test_sign_descent_moves_every_weight_that_matters_by_the_same_length(course):
    weights, path = course.descended(GROUP, 2, 0.5)
    first = hypergradient(**course.problem(course.equal))
    once = {**course.equal, GROUP: -0.5 * first.gradient[GROUP].sign()}
    second = hypergradient(**course.problem(once))
    assert torch.equal(weights[GROUP], once[GROUP] - 0.5 * second.gradient[GROUP].sign())
    assert [loss for loss, _ in path] == [float(first.outer_loss), float(second.outer_loss)]
    assert path[1][0] < path[0][0] and torch.equal(weights[SAMPLE], course.equal[SAMPLE])


def test_smoothness_counts_signs_by_size():
    ends = [{"w": torch.tensor(w)} for w in ([0.0, 0.0, 0.0], [3.0, -1.0, 4.0], [9.0, 0.0, 4.0])]
    assert smoothness(*ends) == pytest.approx((3 - 1 + 0) / 8)


def test_samples_by_sign_train_on_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(whole, "_scores", lambda course, params: seen.append(course) or {})
    course = Course.build("sources", 0, STEPS)
    found = whole.by_sign(course, 1)
    gradient = hypergradient(**course.problem(course.equal)).gradient[SAMPLE][:, 0]
    index = torch.cat([batch.index[batch.index >= 0] for batch in seen[0].batches])
    assert len(seen[0].batches) == STEPS and bool((gradient[index] < 0).all())
    assert found["kept"] == float((gradient < 0).float().mean())


@pytest.mark.slow
def test_one_command_measures_writes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "benchmarks/whole_training.py", "--preset", "smoke", "--threads", "1"]
    command += ["--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [cell["kind"] for cell in content["cells"]] == ["cost", "accuracy", "smooth"]
    cost, students, smooth = content["cells"]
    assert set(students["found"]) == set(whole.METHODS) and cost["hypergradient"] > cost["plain"]
    assert abs(smooth["differences"]["1e-07"] - 1) < 1e-4
    students["found"]["equal weights"]["test"] = 12.5  # it was interrupted here
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900).returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == content["cells"]
    text = (tmp_path / "README.md").read_text()
    assert "| equal weights | 12.50 |" in text and "What failed" not in text
