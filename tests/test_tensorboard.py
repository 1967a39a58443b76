"""What TensorBoard reads back is what the balancer reported."""

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, tensorboard, terms

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def balancer():
    student = nn.Linear(4, 3)
    pair = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    return BilevelLossBalancer(student, pair, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))


@pytest.fixture
def writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as found:
        yield found


def read(writer):
    writer.flush()
    found = events.EventAccumulator(str(writer.log_dir))
    found.Reload()
    return found


BATCH = (torch.linspace(-1, 1, 32).view(8, 4), torch.arange(8) % 3)


def test_every_scalar_of_every_nth_step(balancer, writer):
    expected = {}
    for step in range(1, 7):
        balancer(BATCH, BATCH)
        tensorboard.log(writer, balancer, step, every=3)
        report = balancer.report
        columns = {"weight": report.weights, "loss": report.losses, "influence": report.influence}
        for name, values in columns.items():
            for k, term in enumerate(("hard", "smooth")):
                expected.setdefault(f"metakd/{name}/{term}", []).append(values[:, k].mean().item())
        expected.setdefault("metakd/meta_loss", []).append(report.meta_loss.item())
        expected.setdefault("metakd/hypergradient_norm", []).append(report.hypergradient_norm.item())
    found = read(writer)
    assert set(found.Tags()["scalars"]) == set(expected) and not found.Tags()["histograms"]
    for tag, values in expected.items():
        written = found.Scalars(tag)
        assert [entry.step for entry in written] == [3, 6]
        assert [entry.value for entry in written] == pytest.approx([values[2], values[5]])


def test_a_step_without_a_hypergradient_writes_what_it_has(balancer, writer):
    balancer.loss(BATCH)
    tensorboard.log(writer, balancer, 1, prefix="mine")
    names = {f"mine/{name}/{term}" for name in ("weight", "loss") for term in ("hard", "smooth")}
    assert set(read(writer).Tags()["scalars"]) == names


def test_histograms_hold_every_sample(balancer, writer):
    balancer(BATCH, BATCH)
    tensorboard.log(writer, balancer, 1, histograms=True)
    found = read(writer)
    names = {f"metakd/{name} of samples/{term}" for name in ("weight", "loss", "influence") for term in balancer.terms}
    assert set(found.Tags()["histograms"]) == names
    (entry,) = found.Histograms("metakd/weight of samples/smooth")
    weights = balancer.report.weights[:, 1]
    assert entry.histogram_value.num == 8
    assert entry.histogram_value.sum == pytest.approx(weights.sum().item())
    assert entry.histogram_value.max == pytest.approx(weights.max().item())


def test_a_balancer_without_a_report_says_so_and_other_steps_do_not_look(balancer, writer):
    with pytest.raises(MetaKDError, match="no report yet"):
        tensorboard.log(writer, balancer, 2, every=2)
    tensorboard.log(writer, balancer, 1, every=2)
