"""An iteration as a CUDA graph: when it is captured, when anew, and that it learns the same."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from metakd import Batch, BilevelLossBalancer, MetaKDError
from metakd._call import replay as module
from metakd._call.capture import constants_of
from metakd._call.replay import WARM_UP, Host, Replay
from metakd.estimators import Adjoint, OneStep
from metakd.terms import BalancedSoftmax, CrossEntropy, DebiasedSoftTarget, LearnedSoftTarget, SoftTarget
from metakd.weighting import ClassTable, LossMLP, Normalised

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs: a capture runs nothing, and a replay runs what was captured."""
    captured, capturing = [], []

    class Graph:
        def replay(self):
            self.run()

        def pool(self):
            return None

    @contextmanager
    def capture(graph, **_):
        capturing.append(graph)
        captured.append(graph)
        yield
        capturing.pop()

    @contextmanager
    def on(stream):
        yield

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    def of(iteration, *arguments, **options):
        def run(*items):
            if capturing:
                capturing[-1].run = lambda: iteration(*items)
                return None
            return iteration(*items)

        made = Replay(run, torch.device("cpu"), *arguments, **options)
        made.captures = True
        return made

    for name, value in {"CUDAGraph": Graph, "graph": capture, "Stream": Stream, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    of.captured = captured
    return of


def test_the_graph_reads_each_call_s_values(graphs):
    seen = []
    step = graphs(lambda batch: seen.append(float(batch["x"].sum())))
    for value in range(8):
        step({"x": torch.full((2,), float(value))})
    assert seen == [2.0 * value for value in range(8)] and len(graphs.captured) == 1


def test_a_replay_allocates_nothing_for_its_batches(graphs, monkeypatch):
    step, made, shape = graphs(lambda x: None), [], module._Shape
    monkeypatch.setattr(module, "_Shape", lambda *arguments: made.append(arguments) or shape(*arguments))
    for _ in range(WARM_UP + 5):
        step(torch.ones(2))
    assert len(made) == 1


def test_a_batch_of_another_shape_has_a_graph_of_its_own(graphs):
    seen = []
    step = graphs(lambda x: seen.append(len(x)))
    sizes = [4, 4, 3] * 6
    for size in sizes:
        step(torch.ones(size))
    assert seen == sizes and len(graphs.captured) == 2
    for size in range(10, 10 + module._MOST):  # more than are kept
        step(torch.ones(size))
    assert seen[-1] == 9 + module._MOST and len(step._shapes) == module._MOST


def test_what_is_no_tensor_is_a_part_of_the_shape(graphs):
    seen = []
    step = graphs(lambda item: seen.append(item["flag"]))
    for number in range(12):
        step({"x": torch.ones(2), "flag": number % 2})
    assert seen == [0, 1] * 6


def test_a_changed_constant_drops_the_graphs(graphs):
    rate, after = [0.1], []
    host = Host(lambda: {"the rate": rate[0]})
    host.after_capture = lambda: (lambda: None, lambda: after.append(rate[0]))
    step = graphs(lambda x: None, host)
    for calls, rate[0] in ((6, 0.1), (6, 0.01)):
        for _ in range(calls):
            step(torch.ones(2))
    assert len(graphs.captured) == 2
    assert after == [0.1] * (6 - WARM_UP) + [0.01] * (6 - WARM_UP)


def test_an_iteration_that_is_never_captured_says_what_changes(graphs):
    rate = [0]
    step = graphs(lambda x: None, Host(lambda: {"the rate": rate[0], "the modules": 1}))
    with pytest.warns(UserWarning, match="was not captured in a CUDA graph, .* from call to call: the rate. It"):
        for number in range(module._PATIENCE + 5):
            rate[0] = number // 3
            step(torch.ones(2))
    assert not graphs.captured


def test_what_breaks_a_capture_is_named(graphs, monkeypatch):
    @contextmanager
    def broken(graph, **_):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 (as torch does)

    monkeypatch.setattr(torch.cuda, "graph", broken)
    known = RuntimeError("a copy"), MetaKDError("my")
    for error, words in zip(known, ("cannot be captured in a CUDA graph: a copy", "^my$"), strict=True):
        calls = []

        def iteration(x, error=error, calls=calls):
            calls.append(x)
            if len(calls) > WARM_UP:
                raise error

        step = Replay(iteration, torch.device("cpu"))
        step.captures = True
        for _ in range(WARM_UP):
            step(torch.ones(2))
        with pytest.raises(MetaKDError, match=words):
            step(torch.ones(2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def attentive():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), layer, nn.Flatten(), nn.Linear(24, 3))


COUNTS = (9, 4, 2)
HARD_SOFT = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=2.0)}
KINDS = {
    "a network": ({}, {}),
    "a transformer": ({"build": attentive}, {}),
    "simultaneous": ({}, {"order": "simultaneous"}),
    "a mean of three": ({}, {"accumulate": 3}),
    "every third call": ({}, {"every": 3}),
    "a mean of two of every second": ({}, {"accumulate": 2, "every": 2}),
    "mirrored momentum": ({}, {"inner": "mirror"}),
    "reverse mode": ({}, {"estimator": OneStep("reverse")}),
    "an adjoint": ({}, {"estimator": Adjoint()}),
    "normalised": ({}, {"weighting": lambda: Normalised(LossMLP(2, 2))}),
    "a table of classes": (
        {"terms": {"label": BalancedSoftmax(COUNTS), "teacher": DebiasedSoftTarget(COUNTS)}},
        {"weighting": lambda: ClassTable(3, 2)},
    ),
    "Adam": ({"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2, capturable=p[0].is_cuda)}, {}),
    "a term that learns": ({"terms": lambda: {"hard": CrossEntropy(), "soft": LearnedSoftTarget()}}, {}),
}


def loop(device, about, options, *, capture, check_every=2):
    """A student, its balancer, and a function that takes a step."""
    torch.manual_seed(0)
    student, teacher = (about.get("build", convolutional)().to(device, torch.float64) for _ in range(2))
    build = about.get("optimizer", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    optimizer = build(list(student.parameters()))
    terms = about.get("terms", HARD_SOFT)
    terms = terms() if callable(terms) else copy.deepcopy(terms)
    made = {name: value() if name == "weighting" else value for name, value in options.items()}
    if "weighting" in made:
        made["weighting"].to(device, torch.float64)
    balancer = BilevelLossBalancer(student, terms, optimizer=optimizer, teacher=teacher.eval(), **made)
    balancer.to(device, torch.float64)

    def iteration(batch, meta_batch):
        loss = balancer(batch, meta_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return student, optimizer, balancer, balancer.capture(iteration, check_every=check_every) if capture else iteration


def images(count, size=6, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.randn(size, 3, 4, 4, dtype=torch.float64, generator=generator).to(device),
              torch.randint(3, (size,), generator=generator).to(device))
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_iteration_learns_the_same(kind, device):
    found = []
    for capture in (False, True):
        student, optimizer, balancer, step = loop(device, *KINDS[kind], capture=capture)
        losses, influence = [], []
        for number, (batch, meta) in enumerate(zip(images(40, device=device), images(40, 5, device), strict=True)):
            if number == 22:
                optimizer.param_groups[0]["lr"] /= 10
            if number in (8, 17, 35):  # a loader's last batch
                batch = Batch(batch.inputs[:4], batch.targets[:4])
            losses.append(float(step(batch, meta)))
            seen = balancer.report.influence
            influence.append(torch.zeros(()) if seen is None else seen.clone())
        balancer.read_checks()
        state = [*student.state_dict().values(), *balancer.weighting.state_dict().values()]
        found.append((losses, [*influence, *state]))
        assert balancer.state_dict()["calls"] == 40
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6 if device == "cuda" else 1e-12)
    for ours, written in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, written, rtol=1e-5, atol=1e-7)


@needs_gpu
def test_a_fault_in_a_replay_is_reported_when_its_checks_are_read():
    *_, balancer, step = loop("cuda", {}, {}, capture=True, check_every=100)
    good, meta = images(WARM_UP + 4, device="cuda"), images(1, 5, "cuda")[0]
    for batch in good[:-1]:
        step(batch, meta)
    step(Batch(good[-1].inputs, good[-1].targets + 5), meta)
    with pytest.raises(MetaKDError, match=r"label \d is out of range"):
        balancer.read_checks()


@needs_gpu
@pytest.mark.parametrize(
    ("about", "options", "words"),
    [
        ({"build": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 3))}, {}, "draws random numbers"),
        ({"optimizer": lambda p: torch.optim.Adam(p, capturable=True)}, {"inner": "mirror"}, "counts its steps"),
        ({"optimizer": lambda p: torch.optim.Adam(p)}, {}, "capturable=True"),
    ],
)
def test_what_cannot_be_captured_says_why(about, options, words):
    *_, step = loop("cuda", about, options, capture=True)
    batch, meta = images(1, device="cuda")[0], images(1, 5, "cuda")[0]
    with pytest.raises(MetaKDError, match=words):
        for _ in range(WARM_UP + 2):  # after the first call the optimizers have a state, which is captured too
            step(batch, meta)


def test_a_call_changes_nothing_that_a_graph_holds_as_a_constant():
    student, optimizer, balancer, step = loop("cpu", {}, {}, capture=False)
    batch, meta = images(2)
    step(batch, meta)
    before = constants_of(balancer)
    step(batch, meta)
    assert constants_of(balancer) == before
    for change in (
        lambda: optimizer.param_groups[0].update(lr=0.5),
        lambda: balancer.weighting_optimizer.param_groups[0].update(lr=0.5),
        lambda: student[1].eval(),
        lambda: setattr(student[1], "momentum", 0.2),
        lambda: setattr(student[2], "table", torch.ones(2)),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: balancer.teacher.train(),
        lambda: setattr(balancer, "features", lambda losses, outputs, batch: losses),
        lambda: balancer.load_state_dict(balancer.state_dict()),
        lambda: balancer.terms.update(soft=SoftTarget(temperature=3.0)),
        lambda: student[0].bias.requires_grad_(False),
        lambda: setattr(student[0].weight, "data", student[0].weight.data.clone()),
        lambda: student[0].register_forward_hook(lambda *_: None),
    ):
        change()
        now = constants_of(balancer)
        assert now != before
        before = now
