"""Checkpoints: exact, atomic, and refused when they do not fit."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from metakd.errors import MetaKDError
from metakd.longtail import Checkpoint, fresh_folder
from metakd.longtail.checkpoint import write_atomically


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
