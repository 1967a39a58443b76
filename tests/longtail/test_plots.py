"""Figures show the numbers they were given, labelled."""

import pytest
from PIL import Image

from metakd.longtail import plots

COUNTS = (100, 30, 9)
CLASSES = ("ant", "bee", "cat")


def history(offset):
    return [{"epoch": e, "train_loss": 2.0 / e, "test_loss": 3.0 / e, "test_accuracy": offset + e} for e in range(1, 6)]


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


def test_a_legend_of_long_names_stays_in_the_picture(tmp_path):
    names = [f"{number}: a method whose name is rather long" for number in range(7)]
    accuracy = dict.fromkeys(names, (90, 50, 10))
    figure = plots.class_accuracy(accuracy, COUNTS, CLASSES, tmp_path / "a.png", title="t")
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 < figure.axes[1].get_window_extent().y0


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
