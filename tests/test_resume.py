"""A training that was stopped, saved and loaded in another process goes on to the same bits; a state that does not fit
is refused by name."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError, estimators, weighting
from metakd._basics.rng import RngState
from metakd.terms import CrossEntropy, SoftTarget
from tests.docs.pages import execute
from tests.test_no_trace import assert_same

STEPS, CUT = 10, 5


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, amsgrad=True)


def rmsprop(params):
    return torch.optim.RMSprop(params, lr=1e-2, momentum=0.5)


class Training:
    """Steps of a student with dropout and BatchNorm on batches that depend on the step's number alone."""

    def __init__(self, optimizer=sgd, *, model=None, moved_by=None, windows=0, **options):
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = optimizer(self.student.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        model = None if model is None else model()
        self.windows = windows
        self.balancer = BilevelLossBalancer(
            self.student,
            {"hard": CrossEntropy(), "soft": SoftTarget()},
            optimizer=self.optimizer,
            teacher=nn.Linear(4, 3),
            weighting=model,
            weighting_optimizer=None if moved_by is None else moved_by(model.parameters()),
            **options,
        )

    def run(self, steps):
        for step in steps:
            if self.windows and step % self.windows == 0:
                ahead = [batch(s) for s in range(step, step + self.windows)]
                self.balancer.meta_step(ahead, batch(100 + step))
            loss = self.balancer(batch(step), None if self.windows else batch(100 + step))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    @property
    def parts(self):
        names = ("student", "optimizer", "scheduler", "balancer")
        return {name: getattr(self, name) for name in names}

    def state(self):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {**states, "random": RngState.capture([]).plain()}

    def load(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        RngState.from_plain(state["random"]).restore()
        return self


def batch(number):
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(30, (6,), generator=generator)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator), rows


def mlp():
    return weighting.LossMLP(2, 2, hidden=(5,))


TRAININGS = {
    "SGD": dict(model=mlp),
    "Adam": dict(optimizer=adam, inner="mirror", model=mlp),
    "AdamW": dict(optimizer=adamw, model=mlp),
    "RMSprop": dict(optimizer=rmsprop, model=mlp),
    "accumulate": dict(model=mlp, accumulate=3),
    "every": dict(model=mlp, every=2),
    "both": dict(model=mlp, accumulate=2, every=2, inner="mirror"),
    "lazy": dict(),
    "lazy, pending": dict(accumulate=3),
    "TermScalars": dict(model=lambda: weighting.TermScalars(2)),
    "ClassTable": dict(model=lambda: weighting.ClassTable(3, 2), moved_by=sgd),
    "SampleTable": dict(model=lambda: weighting.SampleTable(30, 2), moved_by=rmsprop),
    "Rectified": dict(model=lambda: weighting.Rectified(2)),
    "weights by AdamW": dict(model=mlp, moved_by=adamw, accumulate=2),
    "reverse": dict(model=mlp, estimator=estimators.OneStep("reverse")),
    "Adjoint": dict(model=mlp, estimator=estimators.Adjoint(), inner="mirror", windows=5),
    "Unroll": dict(optimizer=adam, model=mlp, estimator=estimators.Unroll(), windows=5, accumulate=2),
}
CUTS = {name: CUT for name in TRAININGS} | {"before the first step": 0}


def training(name):
    return Training(**TRAININGS.get(name, {}))


def go_on(folder, *names):
    """What the other process does: load each checkpoint, take the steps that are left, save the result."""
    for name in names:
        state = torch.load(Path(folder) / f"{name}.pt", weights_only=True)
        torch.save(training(name).load(state).run(range(CUTS[name], STEPS)).state(), Path(folder) / f"{name}.end.pt")


FAST = ["SGD", "Adam", "both", "lazy", "ClassTable", "Rectified"]
OTHERS = [name for name in CUTS if name not in FAST]


@pytest.mark.parametrize("names", [FAST, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_half_in_another_process_is_the_whole_bit_for_bit(tmp_path, names):
    for name in names:
        torch.save(training(name).run(range(CUTS[name])).state(), tmp_path / f"{name}.pt")
    code = "import sys, torch; torch.set_num_threads(1); from tests.test_resume import go_on; go_on(*sys.argv[1:])"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *names], cwd=root, check=True)
    for name in names:
        end = torch.load(tmp_path / f"{name}.end.pt", weights_only=True)
        cut = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert_same(end, training(name).run(range(STEPS)).state(), name)
        if name != "Rectified":
            assert repr(end["balancer"]) != repr(cut["balancer"])  # the steps that were left did something


@pytest.mark.parametrize("missing", ["balancer", "random"])
def test_each_part_of_the_recipe_is_needed(missing):
    whole = Training(accumulate=3).run(range(STEPS)).state()
    half = Training(accumulate=3).run(range(CUT)).state()
    torch.manual_seed(1)
    other = Training(accumulate=3)
    torch.manual_seed(1)
    half[missing] = other.state()[missing]
    with pytest.raises(AssertionError):
        assert_same(other.load(half).run(range(CUT, STEPS)).state(), whole)


def test_the_example_goes_on_after_ctrl_c(tmp_path, monkeypatch, capsys):
    train = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "resume.py"))["train"]
    expected = train(30, 4, tmp_path / "whole.pt").state_dict()
    backward, calls = torch.Tensor.backward, iter([True] * 17)

    def interrupted(loss):
        if not next(calls, False):
            raise KeyboardInterrupt
        backward(loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "backward", interrupted)
        train(30, 4, tmp_path / "cut.pt")
    assert_same(dict(train(30, 4, tmp_path / "cut.pt").state_dict()), dict(expected))
    assert "16 of 30 steps are done" in capsys.readouterr().out


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    execute("docs/resume.md", {})
    assert Path("runs/mine.pt").exists()
    assert "skipped: term 'cross_entropy' is nan for sample 0 of the batch" in capsys.readouterr().out


# Checkpoints that do not fit ----------------------------------------------------------------------------------------


def scalars():
    return weighting.TermScalars(2)


MISFITS = {
    "another weight model": (dict(model=mlp), dict(model=scalars), r"at 'weighting': missing .*layers.*'free'"),
    "none to save": (dict(model=mlp), dict(model=lambda: weighting.Rectified(2)), r"at 'weighting': missing"),
    "none to load": (dict(model=lambda: weighting.Rectified(2)), dict(model=mlp), r"at 'weighting'.*not known here"),
    "another width": (
        dict(model=mlp),
        dict(model=lambda: weighting.LossMLP(2, 2, hidden=(7,))),
        r"'weighting.layers.0.weight' has shape \(7, 2\) in the saved state and \(5, 2\) here",
    ),
    "another width, lazy": (
        dict(model=lambda: weighting.LossMLP(None, 2)),
        dict(model=lambda: weighting.LossMLP(2, 2, hidden=(64,))),
        r"at 'weighting': missing",
    ),
    "another dtype": (
        dict(model=mlp),
        dict(model=lambda: mlp().double()),
        r"is torch.float64 in the saved state and torch.float32 here",
    ),
    "another optimizer": (
        dict(model=mlp),
        dict(model=mlp, moved_by=sgd),
        r"weighting_optimizer.param_groups' are of another kind.*'betas'",
    ),
    "other groups": (
        dict(model=mlp, moved_by=adam),
        dict(model=mlp, moved_by=lambda params: torch.optim.Adam([*params][:2])),
        r"hold \[2\] parameters in the saved state and \[4\] here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_named_and_changes_nothing(case, seen):
    here, there, message = MISFITS[case]
    saved = Training(**there).run(range(2)).balancer.state_dict()
    mine = Training(**here).run(range(2 * seen))
    before = mine.state()
    with pytest.raises(MetaKDError, match=message):
        mine.balancer.load_state_dict(saved)
    assert_same(mine.state(), before)
    assert_same(mine.run(range(2 * seen, 4)).state(), Training(**here).run(range(4)).state())


DAMAGES = {
    "NaN in the weights": (
        lambda s: s["weighting"]["layers.0.bias"].fill_(torch.nan), r"'weighting.layers.0.bias' holds NaN"
    ),
    "NaN pending": (lambda s: s["pending"]["layers.0.bias"].fill_(torch.nan), r"'pending.layers.0.bias' holds NaN"),
    "count without pending": (lambda s: s.update(pending={}), r"'pending' does not hold the 1 hypergradients"),
    "count below zero": (lambda s: s.update(pending_count=-1), r"'pending_count' is -1"),
    "a bool for a number": (lambda s: s.update(calls=True), r"'calls' is True"),
    "half of the moments": (
        lambda s: s["weighting_optimizer"]["state"][1].pop("exp_avg_sq"), r"'weighting_optimizer.state.1'.*exp_avg_sq"
    ),
    "moments of another shape": (
        lambda s: s["weighting_optimizer"]["state"][1].update(exp_avg=torch.zeros(9)),
        r"weighting_optimizer.state.1.exp_avg' has shape \(9,\).*\(5,\)",
    ),
    "moments of nobody": (lambda s: s["weighting_optimizer"]["state"].update({7: {}}), r"not known here \[7\]"),
    "a learning rate in words": (
        lambda s: s["weighting_optimizer"]["param_groups"][0].update(lr="high"), r"param_groups.lr' is 'high'"
    ),
    "no learning rate": (
        lambda s: s["weighting_optimizer"]["param_groups"][0].pop("lr"), r"optimizer.param_groups': missing \['lr'\]"
    ),
    "terms that are none": (lambda s: s.update(terms=3), r"saved with the terms 3"),
    "other terms": (lambda s: s.update(terms=["hard", "x"]), r"terms \['hard', 'x'\].*\['hard', 'soft'\]"),
    "no weights": (lambda s: s.pop("weighting"), r"missing \['weighting'\]"),
    "a foreign key": (lambda s: s.update(epoch=3), r"not known here \['epoch'\]"),
    "no tensor": (lambda s: s["weighting"].update({"layers.0.weight": 1}), r"layers.0.weight"),
    "pending of another": (lambda s: s.update(pending={"x": torch.ones(1)}), r"pending.*'x'|'x'.*pending"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damage_is_named(case):
    spoil, message = DAMAGES[case]
    state = Training(model=mlp, accumulate=2).run(range(3)).balancer.state_dict()
    spoil(state)
    mine = Training(model=mlp, accumulate=2)
    before = mine.state()
    with pytest.raises(MetaKDError, match=message):
        mine.balancer.load_state_dict(state)
    assert_same(mine.state(), before)


@pytest.mark.parametrize("state", [None, 3, [], {}])
def test_a_foreign_object_is_no_state(state):
    with pytest.raises(MetaKDError, match="saved state"):
        Training(model=mlp).balancer.load_state_dict(state)


def test_a_state_from_another_torch_may_know_less():
    state = Training(model=mlp).run(range(2)).balancer.state_dict()
    del state["weighting_optimizer"]["param_groups"][0]["foreach"]
    Training(model=mlp).balancer.load_state_dict(state)


def places(state, path=()):
    """The paths to all values in a nest of dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [found for key, value in items for found in ([*path, key], *places(value, (*path, key)))]


PLAIN = [None, "x", -1, 2.5, True, [], {}, [1], {"a": 1}, float("nan")]
TENSORS = [torch.zeros(()), torch.zeros(3, 2), torch.full((5, 2), torch.nan), torch.ones(5, dtype=torch.int64)]
VALUES = st.sampled_from([*PLAIN, *TENSORS, torch.empty(0), torch.ones(2, 2, 2)])


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_whatever_is_loaded_fits_or_is_refused(data):
    """Keys dropped and added, shapes, dtypes and kinds of values changed: loaded as a whole, or not at all."""
    here = data.draw(st.sampled_from([dict(model=mlp, accumulate=2), dict(accumulate=2), dict(model=scalars)]))
    state = Training(**here).run(range(3)).balancer.state_dict()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(state)))
        owner = state
        for key in path[:-1]:
            owner = owner[key]
        if data.draw(st.booleans()):
            owner[path[-1]] = copy.deepcopy(data.draw(VALUES))
        elif data.draw(st.booleans()) or isinstance(owner, list):
            del owner[path[-1]]
        else:
            owner["added"] = copy.deepcopy(data.draw(VALUES))
    mine = Training(**here).run(range(data.draw(st.sampled_from([0, 2]))))
    before = mine.state()
    given_state = copy.deepcopy(state)
    try:
        mine.balancer.load_state_dict(state)
    except MetaKDError as error:
        assert "saved state" in str(error) or "was saved with" in str(error)
        assert_same(mine.state(), before)
    else:
        assert_same(mine.balancer.state_dict()["weighting"], state["weighting"])
        assert_same(mine.balancer.state_dict()["pending"], state["pending"])
    assert repr(state) == repr(given_state)


def test_a_state_of_a_captured_iteration_goes_on_on_a_cpu():
    """On a GPU `capture` lets Adam count there, which torch refuses on a CPU."""
    student = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    balancer = BilevelLossBalancer(student, {"hard": CrossEntropy()}, optimizer=optimizer)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    balancer(batch, batch)
    state = balancer.state_dict()
    for group in state["weighting_optimizer"]["param_groups"]:
        group["capturable"] = True
    balancer.load_state_dict(state)
    balancer(batch, batch)
    assert not any(group["capturable"] for group in balancer.weighting_optimizer.param_groups)
