"""The flagship example as a user runs it: a subprocess, its files, its interruption, its errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from metakd.longtail import build_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar_lt_bikd.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none
SHORT = ["--epochs", "4", "--teacher-epochs", "2"]
TINY = ["--sources", "0", *SHORT]
FIGURES = ["training_curves.png", "class_accuracy.png", "weights_by_class.png", "weights_by_loss.png"]
ROWS = ["teacher", "ce", "kd", "kd-meta", "fixed", "bikd", "mean", "meta", "oracle"]


def command(output, *arguments):
    return [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(output), *arguments]


def run(output, *arguments):
    return subprocess.run(command(output, *arguments), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def record(output):
    return json.loads((output / "results.json").read_text())


def numbers(output):
    """All numbers of a run but its wall times."""
    runs = record(output)["runs"]
    for name in runs:
        del runs[name]["seconds"]
        for entry in runs[name]["history"]:
            del entry["seconds"]
    return runs, record(output).get("learned_weights")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("flagship") / "whole"
    return output, run(output, *TINY)


@pytest.fixture(scope="module")
def sourced(tmp_path_factory):
    """The first run, as the README has it, but short."""
    output = tmp_path_factory.mktemp("flagship") / "sourced"
    return output, run(output, *SHORT)


def test_the_first_run_ends_with_the_table_its_controls_and_what_they_are(sourced):
    output, done = sourced
    assert done.returncode == 0, done.stderr
    assert "10 sources (3 right, 3 half wrong, 4 always wrong)" in done.stdout
    table = done.stdout[done.stdout.index("Test accuracy") :].splitlines()
    assert [line.split()[0] for line in table[3 : 3 + len(ROWS)]] == ROWS
    for method in ROWS[1:]:
        assert re.search(rf"^{method} +[a-z]", "\n".join(table), re.M)
    for name in ["results.json", *FIGURES[:2], "weights_by_source.png"]:
        assert str(output / name) in done.stdout and (output / name).stat().st_size > 1000
    assert re.search(r"oracle, network (\d+) of \1: 100%.*\[\d+:\d+<\d+:\d+", done.stderr)  # the last bar, with its end


def test_the_best_fixed_mixture_is_chosen_by_other_images_and_the_weights_are_recorded(sourced):
    output, _ = sourced
    found = record(output)
    assert found["sources"]["kinds"] == ["right"] * 3 + ["half wrong"] * 3 + ["always wrong"] * 4
    assert sum(found["sources"]["counts"]) == sum(found["data"]["counts"]) and 0.3 < found["sources"]["right"] < 0.6
    weights = torch.tensor(found["learned_weights"]["by_source"])
    assert weights.shape == (10, 2) and weights.std(0).min() > 0 and weights.min() > 0 and weights.max() < 2
    runs, tried = found["runs"], [torch.load(output / f"fixed-{k}.pt", weights_only=True) for k in range(10)]
    assert len({str(one["settings"]["mixture"]) for one in tried}) == 10
    last = runs["fixed"]["history"][-1]
    assert last["train_loss"] in [one["history"][-1]["train_loss"] for one in tried]
    assert all("choice_accuracy" in runs[name]["history"][-1] for name in ROWS[1:])


def test_a_run_with_sources_resumes_to_the_same_numbers(sourced, tmp_path):
    output = shutil.copytree(sourced[0], tmp_path / "copy")
    for name in ("bikd", "mean", "fixed-3"):
        (output / f"{name}.pt").unlink()
    (output / "results.json").unlink()
    assert run(output, *SHORT, "--resume").returncode == 0
    assert numbers(output) == numbers(sourced[0])


def test_sources_and_several_inner_steps(tmp_path):
    done = run(tmp_path, *SHORT, "--methods", "bikd", "--inner-steps", "3")
    assert done.returncode == 0, done.stderr


def test_a_run_without_sources_says_what_it_used_and_ends_with_the_table(whole):
    output, done = whole
    assert done.returncode == 0, done.stderr
    assert "Data: handwritten digits bundled with scikit-learn" in done.stdout
    assert "363 long-tailed training images" in done.stdout
    table = done.stdout[done.stdout.index("Test accuracy") :].splitlines()
    assert table[2].split() == ["overall", "many", "medium", "few", "seconds"]
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in table[3:7]}
    assert list(rows) == ["teacher", "ce", "kd", "bikd"]
    runs = record(output)["runs"]
    for name, row in rows.items():
        scores = runs[name]["last_epoch"]
        assert row[:4] == pytest.approx([scores[k] for k in ("overall", "many", "medium", "few")], abs=0.006)
        assert row[4] > 0
    for name in ["results.json", *FIGURES]:
        assert str(output / name) in done.stdout
    assert re.search(r"bikd, network (\d) of \1: 100%.*\[\d+:\d+<\d+:\d+", done.stderr)  # a progress bar


def test_the_record_is_complete(whole):
    output, _ = whole
    found = record(output)
    assert "cifar_lt_bikd.py" in found["command"] and "--teacher-epochs 2" in found["command"]
    assert {"python", "torch", "torchopt"} <= set(found["versions"])
    assert found["seed"] == 0 and found["arguments"]["epochs"] == 4
    assert sum(found["data"]["counts"]) == 363 and len(found["data"]["classes"]) == 10
    assert found["groups"]["rule"] and "last epoch" in found["accuracy"]
    for name, run_ in found["runs"].items():
        assert len(run_["history"]) == (2 if name == "teacher" else 4)
        last = run_["history"][-1]
        assert last["test_accuracy"] == pytest.approx(run_["last_epoch"]["overall"])
        assert len(run_["last_epoch"]["per_class"]) == 10
        assert run_["history"][0]["train_loss"] > last["train_loss"] > 0
    weights = found["learned_weights"]
    assert weights["terms"] == ["hard", "soft"] and len(weights["by_class"]) == 10
    assert all(0 < weight < 1 for row in weights["by_class"] for weight in row)


def test_figures_are_pictures(whole):
    for name in FIGURES:
        with Image.open(whole[0] / name) as image:
            assert image.width >= 1000 and len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("sent", "when"), [(signal.SIGINT, "teacher"), (KILL, "bikd")])
def test_an_interrupted_run_resumes_to_the_same_numbers(whole, tmp_path, sent, when):
    output = tmp_path / "cut"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A job that a script started in the background ignores Ctrl-C, and so would the processes it starts.
    process = subprocess.Popen(command(output, *TINY), env=ENVIRONMENT, preexec_fn=_heed_interrupts, **pipes)
    deadline = time.monotonic() + 120
    while not (output / f"{when}.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert not (output / "results.json").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
        assert "unfinished run" in run(output, *TINY).stderr  # without --resume nothing is lost
    done = run(output, *TINY, "--resume")
    assert done.returncode == 0, done.stderr
    assert numbers(output) == numbers(whole[0])


def test_resuming_a_finished_run_changes_nothing_and_can_add_a_method(whole, tmp_path):
    output = shutil.copytree(whole[0], tmp_path / "copy")
    before, weights = numbers(output)
    done = run(output, *TINY, "--methods", "bskd", "bikd", "--resume")
    assert done.returncode == 0, done.stderr
    after, weights_after = numbers(output)
    assert list(after) == ["teacher", "bskd", "bikd"]
    assert after["bikd"] == before["bikd"] and after["teacher"] == before["teacher"]
    assert weights_after == weights


def test_resuming_with_other_settings_is_an_error(whole):
    done = run(whole[0], *TINY, "--epochs", "5", "--resume")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "epochs: 4 there, 5 here" in done.stderr


def test_missing_data_is_an_error_that_says_what_to_do(tmp_path):
    done = run(tmp_path / "out", "--dataset", "folder", "--data-root", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train/<class>/*" in done.stderr


def test_a_folder_of_pictures(tmp_path):
    for part, count in (("train", 30), ("test", 4)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 24), (80 * c, 8 * i, 99)).save(tmp_path / part / name / f"{i}.png")
    small = ["--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8", "--validation-per-class", "4"]
    small += ["--teacher", "resnet8", "--student", "convnet2", "--imbalance", "3", "--threads", "1"]
    done = run(
        tmp_path / "out",
        "--dataset",
        "folder",
        "--data-root",
        str(tmp_path),
        *small,
        "--methods",
        "kd",
        "bikd",
    )
    assert done.returncode == 0, done.stderr
    assert f"the images in the folder {tmp_path.name}" in done.stdout
    assert record(tmp_path / "out")["data"]["counts"] == [26, 15, 8]


def test_a_teacher_of_ones_own(tmp_path):
    torch.save(build_model("mlp16", classes=10, channels=1, size=8).state_dict(), tmp_path / "teacher.pt")
    arguments = [
        "--teacher",
        "mlp16",
        "--teacher-checkpoint",
        str(tmp_path / "teacher.pt"),
        "--epochs",
        "2",
        "--sources",
        "0",
    ]
    found = run(tmp_path / "out", "--methods", "kd", *arguments)
    assert found.returncode == 0, found.stderr
    runs = record(tmp_path / "out")["runs"]
    assert runs["teacher"]["history"] == [] and len(runs["kd"]["history"]) == 2


@pytest.mark.skipif("METAKD_CIFAR10" not in os.environ, reason="METAKD_CIFAR10 names no folder of real CIFAR-10")
def test_real_cifar10(tmp_path):
    arguments = ["--dataset", "folder", "--data-root", os.environ["METAKD_CIFAR10"], "--imbalance", "100"]
    arguments += ["--teacher", "convnet4", "--student", "convnet2", "--teacher-epochs", "1", "--epochs", "1"]
    done = run(tmp_path, *arguments, "--methods", "kd", "bikd", "--threads", "1")
    assert done.returncode == 0, done.stderr
    found = record(tmp_path)
    assert sum(found["data"]["counts"]) == 12_156
    assert found["runs"]["bikd"]["last_epoch"]["overall"] > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imbalance", "-3"], "imbalance is -3.0, but"),
        (["--epochs", "0"], "must be a whole number of at least 1, got '0'"),
        (["--accumulate", "few"], "must be a whole number of at least 1, got 'few'"),
        (["--student", "vgg"], "no network named 'vgg'"),
        (["--sources", "3"], "got 3 sources"),
        (["--sources", "0", "--methods", "oracle"], "--methods oracle needs --sources"),
        (["--methods", "mean", "bikd"], "needs bikd before it"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_trained(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_several_inner_steps(whole, tmp_path):
    """The option changes BiKD alone, is recorded, and a checkpoint made with another number is not taken up."""
    output, _ = whole
    several = tmp_path / "several"
    done = run(several, *TINY, "--methods", "kd", "bikd", "--inner-steps", "3")
    assert done.returncode == 0, done.stderr
    assert record(several)["arguments"]["inner_steps"] == 3
    assert numbers(several)[0]["kd"] == numbers(output)[0]["kd"]
    assert numbers(several)[0]["bikd"] != numbers(output)[0]["bikd"]
    refused = run(several, *TINY, "--methods", "kd", "bikd", "--inner-steps", "2", "--resume")
    assert refused.returncode != 0
    assert "inner_steps" in refused.stderr
