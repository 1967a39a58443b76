"""A history is the means of the reports it was fed, in bounded memory and without waiting for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metakd import BilevelLossBalancer, History, MetaKDError, Report, terms

TERMS = ("hard", "soft")


def reports(number, size=6, every=1):
    """Reports and labels; with an influence on every n-th."""
    found = []
    for step in range(1, number + 1):
        asks = step % every == 0
        found.append(
            (
                Report(
                    losses=torch.rand(size, 2),
                    weights=torch.rand(size, 2) + step / number,
                    influence=torch.randn(size, 2) if asks else None,
                    meta_loss=torch.rand(()) if asks else None,
                    hypergradient_norm=torch.rand(()) if asks else None,
                ),
                torch.randint(-1, 3, (size,)),
            )
        )
    return found


def fed(history, steps):
    for report, targets in steps:
        history.add(report, targets)
    return history


class Log(TorchDispatchMode):
    """Remembers every operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_every_window_holds_the_means_of_its_steps():
    steps = reports(11, every=2)
    history = fed(History(TERMS, classes=3, points=4), steps)
    assert history.at.tolist() == [2.5, 6.5, 10.0]  # 1-4, 5-8, 9-11
    for window, part in enumerate((steps[:4], steps[4:8], steps[8:])):
        felt = [report for report, _ in part if report.influence is not None]
        for name, of in (("weights", part), ("losses", part), ("influence", [(r, None) for r in felt])):
            expected = torch.cat([getattr(report, name) for report, _ in of]).double().mean(0)
            assert torch.allclose(history.over_time(name)[window], expected, atol=1e-6), name
        for name in ("meta_loss", "hypergradient_norm"):
            expected = torch.stack([getattr(report, name) for report in felt]).double().mean()
            assert torch.allclose(history.over_time(name)[window], expected, atol=1e-6), name
        spread = torch.cat([report.weights for report, _ in part]).double().std(0, correction=0)
        assert torch.allclose(history.over_time("spread")[window], spread, atol=1e-5)


def test_means_by_class_leave_other_labels_out():
    steps = reports(8)
    history = fed(History(TERMS, classes=4, points=8), steps)
    for last, part in ((1.0, steps), (0.25, steps[6:]), (0.0, steps[7:])):
        weights = torch.cat([report.weights for report, _ in part]).double()
        targets = torch.cat([targets for _, targets in part])
        for c in range(4):
            expected = weights[targets == c].mean(0)
            assert torch.allclose(history.by_class("weights", last=last)[c], expected, atol=1e-6, equal_nan=True)
    assert history.by_class()[3].isnan().all()
    both = torch.cat([r.weights[(t == 0) | (t == 2)] for r, t in steps[2:3]]).double().mean(0)
    assert torch.allclose(history.over_time("weights", [0, 2])[2], both, atol=1e-6, equal_nan=True)


def test_memory_does_not_grow():
    history = History(TERMS, classes=2, points=8)
    sizes = {sum(t.numel() for t in fed(history, reports(1)).state_dict().values() if torch.is_tensor(t))}
    for _ in range(200):
        fed(history, reports(1))
        sizes.add(sum(t.numel() for t in history.state_dict().values() if torch.is_tensor(t)))
        assert len(history.at) <= 8
    assert len(sizes) == 1
    assert history.steps == 201 and len(history.at) > 4
    assert history.over_time("weights").isfinite().all()


def test_resume_goes_on_to_the_same_bits(tmp_path):
    steps = reports(10)
    whole = fed(History(TERMS, classes=3, points=4), steps)
    torch.save(fed(History(TERMS, classes=3, points=4), steps[:5]).state_dict(), tmp_path / "h.pt")
    resumed = History(TERMS, classes=3, points=4)
    resumed.load_state_dict(torch.load(tmp_path / "h.pt", weights_only=True))
    one, other = whole.state_dict(), fed(resumed, steps[5:]).state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], key


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (History(("hard", "easy"), 3), "'terms' is .'hard', 'easy'., but here it is .'hard', 'soft'."),
        (History(TERMS, 4), "same terms, classes and points"),
        (History(TERMS, 3, points=2), "same terms, classes and points"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(other, message):
    history = fed(History(TERMS, classes=3), reports(3))
    before = history.over_time("weights")
    with pytest.raises(MetaKDError, match=message):
        history.load_state_dict(other.state_dict())
    with pytest.raises(MetaKDError, match=r"it lacks .*'samples'"):
        history.load_state_dict({"terms": ["hard", "soft"]})
    assert torch.equal(history.over_time("weights"), before)


def test_a_skipped_step_counts_as_a_step_alone():
    history = fed(History(TERMS, points=4), reports(2))
    history.add(Report(torch.full((3, 2), torch.inf), torch.ones(3, 2), skipped="float16 overflowed"))
    assert history.steps == 3
    assert history.over_time("losses")[:2].isfinite().all() and history.over_time("losses")[2].isnan().all()


def test_adding_never_looks_at_a_value():
    steps = reports(9)
    history = History(TERMS, classes=3, points=4)
    with Log() as log:
        fed(history, steps)
    assert "index_add_" in log.names
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
    assert not waits & set(log.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_adding_does_not_wait_for_a_gpu():
    steps = [
        (Report(*(None if v is None else v.cuda() for v in list(vars(r).values())[:5])), t.cuda())
        for r, t in reports(9)
    ]
    history = fed(History(TERMS, classes=3, points=4), steps[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        fed(history, steps[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert history.over_time("weights").isfinite().all()


def test_reading_a_report_computes_nothing():
    student = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, [terms.CrossEntropy()], optimizer=optimizer)
    batch = (torch.randn(8, 4), torch.arange(8) % 3)
    balancer(batch, batch)
    with Log() as log:
        values = list(vars(balancer.report).values())
        again = list(vars(balancer.report).values())
    assert not log.names
    assert all(a is b for a, b in zip(values, again, strict=True))
    assert not any(v.requires_grad for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: History(TERMS, points=5), "points is 5, but must be even"),
        (lambda: History(TERMS, classes=-1), "classes is -1"),
        (lambda: fed(History(["hard"]), reports(1)), r"the report has 2 terms, the History has 1: \['hard'\]"),
        (lambda: History(TERMS, 3).add(reports(1)[0][0]), r"by class \(3 groups\) needs the class .* got None"),
        (lambda: fed(History(TERMS), reports(1)).over_time("weight"), "has no 'weight'; it has weights, losses"),
        (lambda: fed(History(TERMS), reports(1)).by_class(), r"by class, knows the numbers \[\].*classes=C"),
        (lambda: fed(History(TERMS, 3, by="source"), reports(1)).over_time("losses", [3]), "by source, knows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(act, message):
    with pytest.raises(MetaKDError, match=message):
        act()
