"""Figures show the numbers they were given, labelled, and need no display."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from metakd.longtail import LearnedWeights, plots

COUNTS = (100, 30, 9)
CLASSES = ("ant", "bee", "cat")


def history(offset):
    return [{"epoch": e, "train_loss": 2.0 / e, "test_loss": 3.0 / e, "test_accuracy": offset + e} for e in range(1, 6)]


def learned(classes=3):
    targets = torch.arange(60) % classes
    weights = torch.stack([targets / classes, 1 - targets / classes], 1)
    axes = torch.linspace(0, 3, 5).unsqueeze(1).repeat(1, 2)
    surface = torch.rand(5, 5, 2)
    return LearnedWeights(("hard", "soft"), targets, 3 * torch.rand(60, 2), weights, axes, surface)


def lines(panel):
    return {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}


def is_a_picture(path):
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(maxcolors=10**6)
        return image.width > 1000 and len(colours) > 20


def labelled(figure):
    return all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes) and figure.get_suptitle()


def test_training_curves(tmp_path):
    path = tmp_path / "a.png"
    figure = plots.training_curves({"kd": history(50), "bikd": history(60)}, path, title="t")
    assert is_a_picture(path) and labelled(figure)
    loss, _, accuracy = figure.axes
    assert lines(accuracy) == {"KD": [51, 52, 53, 54, 55], "BiKD": [61, 62, 63, 64, 65]}
    assert lines(loss)["KD"] == pytest.approx([2.0, 1.0, 2 / 3, 0.5, 0.4])
    assert "%" in accuracy.get_ylabel()


def test_training_curves_leave_out_epochs_without_evaluation(tmp_path):
    entries = history(50)
    for entry in entries[:3]:
        del entry["test_accuracy"], entry["test_loss"]
    figure = plots.training_curves({"kd": entries}, tmp_path / "a.png", title="t")
    assert list(figure.axes[2].get_lines()[0].get_xdata()) == [4, 5]
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == 5


def test_class_accuracy_below_the_class_counts(tmp_path):
    path = tmp_path / "a.png"
    figure = plots.class_accuracy({"ce": (90, 50, 10), "bikd": (80, 60, 40)}, COUNTS, CLASSES, path, title="t")
    assert is_a_picture(path) and labelled(figure)
    counts, accuracy = figure.axes
    assert [bar.get_height() for bar in counts.patches] == list(COUNTS)
    assert lines(accuracy) == {"CE": [90, 50, 10], "BiKD": [80, 60, 40]}
    assert [label.get_text() for label in accuracy.get_xticklabels()] == list(CLASSES)


def test_a_method_has_the_same_colour_in_every_figure(tmp_path):
    first = plots.training_curves({"bikd": history(1)}, tmp_path / "a.png", title="t")
    both = {"ce": (1, 2, 3), "bikd": (1, 2, 3)}
    second = plots.class_accuracy(both, COUNTS, CLASSES, tmp_path / "b.png", title="t")
    colour = {line.get_label(): line.get_color() for line in second.axes[1].get_lines()}
    assert first.axes[0].get_lines()[0].get_color() == colour["BiKD"] != colour["CE"]


def test_a_hundred_classes_get_dots_and_a_running_mean(tmp_path):
    values = [float(c % 2) for c in range(100)]
    figure = plots.class_accuracy(
        {"kd": values}, range(500, 0, -5), [str(c) for c in range(100)], tmp_path / "a.png", title="t"
    )
    dots, mean = figure.axes[1].get_lines()
    assert list(dots.get_ydata()) == values
    assert len(mean.get_ydata()) == 100 and max(abs(v - 0.5) for v in mean.get_ydata()[10:90]) < 0.1
    assert mean.get_label() == "KD"


def test_weights_by_class(tmp_path):
    path = tmp_path / "a.png"
    figure = plots.weights_by_class(learned(), COUNTS, CLASSES, path, title="t")
    assert is_a_picture(path) and labelled(figure)
    assert lines(figure.axes[1])["soft term"] == pytest.approx([1, 2 / 3, 1 / 3])


def test_weight_surface_has_the_student_on_the_horizontal_axis(tmp_path):
    path, weights = tmp_path / "a.png", learned()
    figure = plots.weight_surface(weights, path, title="t")
    assert is_a_picture(path)
    hard, soft, bar = figure.axes
    assert "student" in hard.get_xlabel() and "teacher" in hard.get_ylabel() and bar.get_ylabel() == "weight"
    for k, panel in enumerate((hard, soft)):
        mesh = panel.collections[0]
        shown = torch.as_tensor(mesh.get_array()).reshape(5, 5)  # rows are the vertical axis
        assert torch.allclose(shown.float(), weights.surface[:, :, k].T)
    assert hard.collections[0].get_clim() == soft.collections[0].get_clim()


def test_no_display_and_no_global_state():
    code = (
        "import sys, torch; from pathlib import Path; from metakd.longtail import plots;"
        "plots.training_curves({'ce': [{'epoch': 1, 'train_loss': 1.0}]}, Path(sys.argv[1]), title='t');"
        "sys.exit('pyplot' if 'matplotlib.pyplot' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, env=_no_display())


def _no_display():
    import os

    return {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
