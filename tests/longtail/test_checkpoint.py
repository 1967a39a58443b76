"""Checkpoints: exact, atomic, and refused when they do not fit."""

import copy
import itertools
import multiprocessing
import random
import re
import time

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, StepLR

from metakd._basics.rng import RngState
from metakd.errors import MetaKDError
from metakd.longtail import Checkpoint, fresh_folder
from metakd.longtail.checkpoint import write_atomically
from tests.test_no_trace import assert_same


class Training:
    """A small training with momentum, a schedule and dropout: every kind of state there is."""

    def __init__(self, path, width=4, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = MultiStepLR(self.optimizer, [2, 4])
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "none": None}
        self.checkpoint = Checkpoint(path, {"lr": 0.1, **settings}, parts)

    def epoch(self):
        loss = self.model(torch.randn(8, 3)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.pt"


def message(call):
    with pytest.raises(MetaKDError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_continues_to_the_same_bits(path, stop):
    straight = Training(path.with_name("other.pt"))
    expected = [straight.epoch() for _ in range(6)]

    first = Training(path)
    history = []
    for _ in range(stop):
        history.append({"loss": first.epoch()})
        first.checkpoint.save(history)
    first.epoch()  # lost work after the last checkpoint

    second = Training(path)
    torch.manual_seed(99)
    history = second.checkpoint.load()
    losses = [entry["loss"] for entry in history] + [second.epoch() for _ in range(6 - stop)]
    assert losses == expected
    for name, value in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)
    assert second.scheduler.get_last_lr() == straight.scheduler.get_last_lr()


def test_without_a_file_there_is_no_history(path):
    training = Training(path)
    before = torch.get_rng_state()
    assert training.checkpoint.load() == []
    assert torch.equal(before, torch.get_rng_state())


def test_other_settings_are_refused_by_name(path):
    Training(path, epochs=5, seed=1).checkpoint.save([])
    words = message(Training(path, epochs=6, batch=3).checkpoint.load)
    assert "epochs: 5 there, 6 here" in words
    assert "seed: 1 there, 'absent' here" in words
    assert "batch: 'absent' there, 3 here" in words
    assert "lr" not in words.split("(")[1].split(")")[0]
    assert "--output" in words


def test_another_architecture_is_refused(path):
    Training(path).checkpoint.save([])
    assert "does not fit this run" in message(Training(path, width=5).checkpoint.load)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"not a checkpoint", None])
def test_a_broken_file_is_named(path, content):
    training = Training(path)
    training.checkpoint.save([{"loss": 1.0}])
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    words = message(training.checkpoint.load)
    assert str(path) in words and "cannot be read" in words and "delete it" in words


def test_a_file_of_something_else_is_named(path):
    torch.save({"weights": torch.zeros(2)}, path)
    assert "cannot be read" in message(Training(path).checkpoint.load)
    torch.save([1, 2], path)
    assert "cannot be read" in message(Training(path).checkpoint.load)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_cannot_run_code(path, capsys):
    torch.save({"settings": Evil()}, path)
    assert "cannot be read" in message(Training(path).checkpoint.load)
    assert capsys.readouterr().out == ""


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(path):
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_replaces_the_file_in_one_step(path):
    path.write_text("old")
    with path.open() as before:
        write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert before.read() == "old"  # who reads meanwhile has the old file, whole
    assert path.read_text() == "new"


def test_a_fresh_start_keeps_unfinished_work_and_other_peoples_files(path):
    folder = path.parent
    for name in ("kd.pt", "mine.pt"):
        (folder / name).write_text("x")
    assert "kd.pt" in (words := message(lambda: fresh_folder(folder, ["ce", "kd"]))) and "--resume" in words
    assert (folder / "kd.pt").exists()
    (folder / "results.json").write_text("{}")
    fresh_folder(folder, ["ce", "kd"])
    assert [p.name for p in folder.iterdir()] == ["mine.pt"]
    fresh_folder(folder / "new" / "deep", ["ce"])
    assert (folder / "new" / "deep").is_dir()


def everything(training):
    parts = (training.model, training.optimizer, training.scheduler)
    return [part.state_dict() for part in parts], RngState.capture([]).plain()


def without(name):
    return lambda content: content["parts"].pop(name)


def in_part(name, change):
    return lambda content: change(content["parts"][name])


MISFITS = {
    "a part is missing": (without("scheduler"), r"at 'parts': missing \['scheduler'\]"),
    "a part is foreign": (lambda c: c["parts"].update(balancer={}), r"at 'parts'.*not known here \['balancer'\]"),
    "a tensor is missing": (in_part("model", lambda s: s.pop("0.bias")), r"training's model: missing \['0.bias'\]"),
    "a tensor of another shape": (
        in_part("model", lambda s: s.update({"3.bias": torch.zeros(4)})),
        r"training's model's '3.bias' has shape \(4,\) in the saved state and \(1,\) here",
    ),
    "a tensor of another dtype": (
        in_part("model", lambda s: s.update({"3.bias": torch.zeros(1).half()})), r"'3.bias' is torch.float16 in the"
    ),
    "the optimizer of another model": (
        in_part("optimizer", lambda s: s["param_groups"][0]["params"].pop()), r"hold \[5\] parameters .* \[6\] here"
    ),
    "another optimizer": (
        lambda c: c["parts"].update(optimizer=torch.optim.Adam(Training("nowhere").model.parameters()).state_dict()),
        r"training's optimizer's 'param_groups' are of another kind",
    ),
    "another buffer's momentum": (
        in_part("optimizer", lambda s: s["state"][0].update(momentum_buffer=torch.zeros(3, 3))),
        r"'state.0.momentum_buffer' has shape \(3, 3\)",
    ),
    "another scheduler": (
        lambda c: c["parts"].update(scheduler=StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 3).state_dict()),
        r"training's scheduler are of another kind.*missing \['milestones'\]",
    ),
    "no scheduler at all": (lambda c: c["parts"].update(scheduler=3), r"cannot take the saved state"),
    "no random state": (lambda c: c.update(random={}), r"KeyError"),
    "a damaged random state": (lambda c: c["random"].update(cpu=torch.zeros(3)), r"cannot take the saved state"),
    "a damaged random state of Python": (lambda c: c["random"].update(python=(3, (), None)), r"cannot take the saved"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_taken_up(path, case):
    spoil, expected = MISFITS[case]
    first = Training(path)
    first.epoch()
    first.checkpoint.save([{"loss": 1.0}])
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, path)
    second = Training(path)
    second.epoch(), second.epoch()
    torch.manual_seed(7)
    before = copy.deepcopy(everything(second))
    words = message(second.checkpoint.load)
    assert re.search(expected, words) and str(path) in words and "delete it" in words
    assert_same(everything(second), before)


class Fussy(nn.Linear):
    """A part of which nobody can tell beforehand that it will not load."""

    def load_state_dict(self, state, *args, **options):
        super().load_state_dict(state, *args, **options)
        if state["bias"].item() == 3:
            raise KeyError("not today")


def test_a_part_that_fails_in_the_middle_takes_the_others_back(path):
    training, fussy = Training(path), Fussy(1, 1)
    training.checkpoint.parts = {"first": training.model, "fussy": fussy, "last": training.optimizer}
    nn.init.constant_(fussy.bias, 3.0)
    training.checkpoint.save([])
    nn.init.constant_(fussy.bias, 2.0)
    training.epoch()
    before = copy.deepcopy((everything(training), fussy.state_dict()))
    assert "(KeyError: 'not today')" in message(training.checkpoint.load)
    assert_same((everything(training), fussy.state_dict()), before)


def test_all_generators_go_on_where_they_were(path):
    training = Training(path)
    random.seed(3), numpy.random.seed(3), numpy.random.randn()
    training.checkpoint.save([])
    first = torch.rand(2).tolist(), random.gauss(0, 1), numpy.random.randn(3).tolist()
    training.checkpoint.load()
    assert first == (torch.rand(2).tolist(), random.gauss(0, 1), numpy.random.randn(3).tolist())


@pytest.mark.parametrize("length", [0, 1, 100, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_changes_nothing(path, length):
    training = Training(path)
    training.epoch()
    training.checkpoint.save([])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    before = copy.deepcopy(everything(training))
    assert "cannot be read" in message(training.checkpoint.load)
    assert_same(everything(training), before)


def saves_for_ever(path, started):
    checkpoint = Checkpoint(path, {}, {"model": (model := nn.Linear(200, 200))})
    for number in itertools.count():
        nn.init.constant_(model.weight, number)
        checkpoint.save([{"number": number}])
        if number == 1:
            started.set()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork and SIGKILL")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(path):
    fork = multiprocessing.get_context("fork")  # spawned processes would import torch for seconds, again and again
    wait, rests, seen = random.Random(0), 0, set()
    for _ in range(25):
        started = fork.Event()
        process = fork.Process(target=saves_for_ever, args=(path, started))
        process.start()
        assert started.wait(60)
        time.sleep(wait.uniform(0, 0.02))
        process.kill()
        process.join()
        rests += len(list(path.parent.iterdir())) - 1
        model = nn.Linear(200, 200)
        (entry,) = Checkpoint(path, {}, {"model": model}).load()
        assert (model.weight == entry["number"]).all()
        assert list(path.parent.iterdir()) == [path]
        seen.add(entry["number"])
    assert rests > 0 and len(seen) > 1  # some died while they wrote
