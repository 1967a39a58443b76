"""Figures show the numbers they were given, labelled, and need no display."""

import builtins
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from metakd import BilevelLossBalancer, History, MetaKDError, Report, plots, terms, weighting

TERMS = ["hard", "soft"]


@pytest.fixture
def history():
    """The weights of class c at step t are t / 10 and c / 10, its influence -c and c."""
    found = History(TERMS, classes=3, points=16)
    targets = torch.arange(6) % 3
    for t in range(1, 11):
        weights = torch.stack([torch.full((6,), t / 10), targets / 10], dim=1)
        influence = torch.stack([-targets, targets], dim=1).float() if t % 2 == 0 else None
        alone = (None, None) if influence is None else (torch.tensor(1.0 / t), torch.tensor(0.1 * t))
        learned = {"terms.hard.offset": torch.tensor([t / 10, -t / 10]), "terms.soft.tau": torch.tensor(t / 5)}
        found.add(Report(torch.ones(6, 2), weights, influence, *alone, term_parameters=learned), targets)
    return found


def lines(panel):
    return {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}


def steps(panel):
    return list(panel.get_lines()[0].get_xdata())


def is_a_picture(path):
    with Image.open(path) as image:
        return image.width > 800 and len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20


ALL = {
    "weights_by_class": lambda history, **o: plots.weights_by_class(history, **o),
    "influence_by_class": lambda history, **o: plots.influence_by_class(history, **o),
    "weights_over_time": lambda history, **o: plots.weights_over_time(history, **o),
    "influence_over_time": lambda history, **o: plots.influence_over_time(history, **o),
    "meta_loss_over_time": lambda history, **o: plots.meta_loss_over_time(history, **o),
    "terms_over_time": lambda history, **o: plots.terms_over_time(history, **o),
    "weights_by_loss": lambda history, **o: plots.weights_by_loss(
        weighting.LossMLP(2, 2), torch.rand(9, 2), terms=TERMS, features=["a", "b"], **o
    ),
}


def test_all_figures_are_tried_here():
    assert set(ALL) == set(plots.__all__)


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_written_labelled_and_titled(name, history, tmp_path):
    figure = ALL[name](history, path=tmp_path / "a.png")
    assert is_a_picture(tmp_path / "a.png")
    assert figure.get_suptitle() and all(panel.get_xlabel() or panel.get_ylabel() for panel in figure.axes)
    assert ALL[name](history, title="of my own").get_suptitle() == "of my own"


@pytest.mark.parametrize("name", ALL)
def test_it_draws_into_axes_of_ones_own(name, history):
    count = 2 if name in ("meta_loss_over_time", "weights_by_loss", "terms_over_time") else 1
    mine = Figure()
    axes = mine.subplots(1, count, squeeze=False)[0]
    assert ALL[name](history, axes=axes if count > 1 else axes[0]) is mine
    assert all(panel.has_data() for panel in axes)
    with pytest.raises(MetaKDError, match=rf"has {count} panel.s., but got 3 axes"):
        ALL[name](history, axes=list(mine.subplots(1, 3)))


def test_the_parameters_of_terms(history):
    figure = plots.terms_over_time(history)
    assert [panel.get_ylabel() for panel in figure.axes] == ["hard.offset", "soft.tau"]
    first, second = (lines(panel) for panel in figure.axes)
    ramp = [t / 10 for t in range(1, 11)]
    assert first == {"0": pytest.approx(ramp), "1": pytest.approx([-t for t in ramp])}
    assert list(second.values()) == [pytest.approx([2 * t for t in ramp])]
    with pytest.raises(MetaKDError, match="no term with parameters of its own"):
        plots.terms_over_time(History(TERMS))


def test_numbers_by_class(history):
    figure = plots.weights_by_class(history, classes=["ant", "bee", "cat"], counts=[90, 30, 9])
    counts, panel = figure.axes
    assert [bar.get_height() for bar in counts.patches] == [90, 30, 9]
    assert lines(panel) == {"hard term": pytest.approx([1, 1, 1]), "soft term": pytest.approx([0, 0.1, 0.2])}
    assert [label.get_text() for label in panel.get_xticklabels()] == ["ant", "bee", "cat"]
    assert panel.get_xlabel() == "class, from head to tail"
    assert lines(plots.weights_by_class(history, last=1.0).axes[0])["hard term"] == pytest.approx([0.55] * 3)
    drawn = lines(plots.influence_by_class(history, last=1.0).axes[0])
    assert drawn["hard term"] == pytest.approx([0, -1, -2]) and drawn["soft term"] == pytest.approx([0, 1, 2])
    given = plots.weights_by_class(torch.tensor([[0.1], [0.2]]), terms=["one"])
    assert lines(given.axes[0]) == {"one term": pytest.approx([0.1, 0.2])}


def test_other_groups_than_classes_have_their_name():
    history = History(TERMS, classes=2, by="source")
    history.add(Report(torch.ones(4, 2), torch.rand(4, 2), influence=torch.rand(4, 2)), torch.arange(4) % 2)
    for draw, title in ((plots.weights_by_class, "Learned weights"), (plots.influence_by_class, "Influence on the")):
        figure = draw(history, counts=[9, 3])
        assert figure.axes[1].get_xlabel() == "source" and figure.get_suptitle().startswith(title)
        assert figure.get_suptitle().endswith(" by source")
    given = plots.weights_by_class(torch.rand(3, 1), terms=["one"], by="annotator")
    assert given.axes[0].get_xlabel() == "annotator" and given.get_suptitle() == "Learned weights by annotator"
    assert plots.weights_by_class(history, title=None).get_suptitle() == ""


def test_a_hundred_classes_get_dots_and_a_running_mean_that_leaves_unseen_ones_out():
    values = torch.arange(100.0).remainder(2).unsqueeze(1)
    values[50] = torch.nan
    dots, mean = plots.weights_by_class(values, terms=["one"]).axes[0].get_lines()
    assert len(dots.get_ydata()) == 100 and mean.get_label() == "one term"
    assert all(abs(v - 0.5) < 0.13 for v in mean.get_ydata()[10:90])


def test_numbers_over_time(history):
    panel = plots.weights_over_time(history).axes[0]
    assert steps(panel) == list(range(1, 11))
    assert lines(panel)["hard term"] == pytest.approx([t / 10 for t in range(1, 11)])
    shades = [shade.get_paths()[0].vertices[:, 1] for shade in panel.collections]
    assert shades[0].max() == pytest.approx(1.0, abs=1e-3)  # all samples alike
    deviation = torch.tensor([0.0, 0.1, 0.2]).std(correction=0)
    assert shades[1].max() == pytest.approx(0.1 + float(deviation), abs=1e-3)
    panel = plots.influence_over_time(history).axes[0]
    assert steps(panel) == [2, 4, 6, 8, 10]  # where there was one
    assert lines(panel)["soft term"] == pytest.approx([1] * 5)
    loss, norm = plots.meta_loss_over_time(history).axes
    assert next(iter(lines(loss).values())) == pytest.approx([1 / t for t in (2, 4, 6, 8, 10)])
    assert next(iter(lines(norm).values())) == pytest.approx([0.1 * t for t in (2, 4, 6, 8, 10)])


def test_groups_of_classes_have_a_panel_a_term(history):
    figure = plots.influence_over_time(history, groups={"head": [0], "tail": [1, 2]})
    hard, soft = figure.axes
    assert (hard.get_title(), soft.get_title()) == ("hard term", "soft term")
    assert lines(hard)["tail"] == pytest.approx([-1.5] * 5) and lines(soft)["tail"] == pytest.approx([1.5] * 5)
    assert lines(soft)["head"] == pytest.approx([0] * 5)


def test_the_map_over_two_losses_has_the_first_across():
    class Model(nn.Module):
        def forward(self, features, batch):
            return torch.stack([features[:, 0], 10 * features[:, 1]], dim=1)

    samples = torch.stack([torch.linspace(0, 2, 50), torch.linspace(0, 1, 50)], dim=1)
    figure = plots.weights_by_loss(Model(), samples, terms=TERMS, features=["across", "up"], limits=[2, 1])
    hard, soft, bar = figure.axes
    assert (hard.get_xlabel(), hard.get_ylabel(), bar.get_ylabel()) == ("across", "up", "weight")
    assert hard.get_xlim() == (0, 2) and soft.get_ylim() == (0, 1)
    mesh, dots = hard.collections
    across = torch.as_tensor(mesh.get_array()).reshape(64, 64)  # rows are the vertical axis
    assert torch.allclose(across, torch.linspace(0, 2, 64).double().expand(64, 64), atol=1e-5)
    up = torch.as_tensor(soft.collections[0].get_array()).reshape(64, 64)
    assert torch.allclose(up.T, torch.linspace(0, 10, 64).double().expand(64, 64), atol=1e-5)
    assert mesh.get_clim() == soft.collections[0].get_clim() == (0, 10)
    assert sorted(dots.get_offsets()[:, 0].tolist()) == pytest.approx(samples[:, 0].tolist())


def test_one_loss_makes_a_line_a_term():
    panel = plots.weights_by_loss(lambda x, batch: torch.cat([x, 1 - x], 1), terms=TERMS, features=["loss"]).axes[0]
    assert steps(panel)[-1] == 3 and lines(panel)["soft term"][-1] == pytest.approx(-2)


def test_a_balancer_names_terms_and_features_and_keeps_its_modes():
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.forward = lambda features, batch: nn.Sequential.forward(model, features)
    pair = {"hard": terms.CrossEntropy(), "soft": terms.SoftTarget()}
    balancer = BilevelLossBalancer(student, pair, optimizer=optimizer, teacher=nn.Linear(4, 3), weighting=model)
    before = [b.clone() for b in model.buffers()]
    figure = plots.weights_by_loss(balancer)
    assert figure.axes[0].get_xlabel() == "student's cross-entropy (nats)"
    assert figure.axes[1].get_title() == "weight of the soft term"
    assert model.training and all(map(torch.equal, before, model.buffers()))
    own = BilevelLossBalancer(student, {"hard": terms.CrossEntropy()}, optimizer=optimizer)
    assert plots.weights_by_loss(own).axes[0].get_xlabel() == "loss of the hard term"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda h: plots.weights_by_class(h, classes=["a"]), "'classes': 1"),
        (lambda h: plots.weights_by_class(torch.rand(3, 2)), "'terms': 0"),
        (lambda h: plots.weights_by_class(torch.rand(3), terms=["a"]), r"got \(3,\), 3 of them finite"),
        (lambda h: plots.influence_by_class(History(TERMS, classes=2)), r"0 of them finite.*add steps to a Hist"),
        (lambda h: plots.weights_over_time(History(TERMS)), "no step of the history has 'weights'"),
        (lambda h: plots.weights_over_time(h, groups={"x": [3]}), r"not \[3\]"),
        (lambda h: plots.weights_by_loss(weighting.LossMLP(3, 1), torch.rand(4, 3)), "one or two features, got 3"),
        (lambda h: plots.weights_by_loss(weighting.LossMLP(2, 1)), "got 0 names"),
        (lambda h: plots.weights_by_loss(weighting.LossMLP(1, 1), torch.rand(4, 1), terms=TERMS), "returns 1 weights"),
        (lambda h: plots.weights_by_loss(weighting.ClassTable(3, 1), torch.rand(4, 2)), "needs batch.targets"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(act, message, history):
    with pytest.raises(MetaKDError, match=message):
        act(history)


def test_a_missing_matplotlib_is_named_with_its_cure(history, monkeypatch):
    known = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MetaKDError, match=r'pip install "metakd\[plots\]"'):
        plots.weights_over_time(history)


def test_no_matplotlib_at_import_and_no_display_and_no_global_state_at_all(tmp_path):
    code = (
        "import sys, torch, metakd;"
        "assert 'matplotlib' not in sys.modules and 'tensorboard' not in sys.modules;"
        "metakd.plots.weights_by_class(torch.rand(3, 1), terms=['hard'], path=sys.argv[1]);"
        "sys.exit('pyplot' if 'matplotlib.pyplot' in sys.modules else 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, env=environment)
