"""Checkpoints that an interrupted run resumes from with the same numbers as an uninterrupted run."""

from __future__ import annotations

import contextlib
import copy
import glob
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from metakd._basics.rng import RngState
from metakd._call.optimizer_state import check_optimizer_state, load_optimizer_state
from metakd._call.saved_state import check_keys, check_kind, check_state, loading
from metakd.errors import MetaKDError


class Stateful(Protocol):
    """Anything with a state: modules, optimizers, schedulers, a balancer."""

    def state_dict(self) -> Any:
        """The state as plain tensors, numbers and containers."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Load a state."""


class Checkpoint:
    """The file of one training run: the states of its parts, its history, the random state and the settings.

    A save writes a temporary file that replaces the old one, so a run killed at any moment leaves a whole checkpoint.
    Loading uses ``weights_only=True``: a checkpoint cannot run code.

    Args:
        path: the file.
        settings: everything that decides the run's numbers; a checkpoint with other settings is refused.
        parts: objects with a state, by name; None for parts that this run does not have.

    Examples:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> checkpoint = Checkpoint(Path(folder.name) / "run.pt", {"lr": 0.1}, {"model": model})
        >>> checkpoint.load()
        []
        >>> checkpoint.save([{"loss": 1.0}])
        >>> checkpoint.load()
        [{'loss': 1.0}]
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], parts: Mapping[str, Stateful | None]) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def save(self, history: list[dict[str, Any]]) -> None:
        """Write the state of all parts after ``len(history)`` epochs."""
        content = {
            "settings": self.settings,
            "history": history,
            "random": _random_state().plain(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        write_atomically(self.path, lambda temporary: torch.save(content, temporary))

    def load(self) -> list[dict[str, Any]]:
        """Load the saved state, all of it or, if an error is raised, nothing.

        Also removes temporary files of processes that were killed while writing.

        Returns:
            The history, one entry per epoch; empty if there is no checkpoint.

        Raises:
            MetaKDError: the file cannot be read, belongs to a run with other settings, or holds other parts.
        """
        for rest in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.tmp"):
            rest.unlink(missing_ok=True)
        if not self.path.exists():
            return []
        content = self._read()
        saved = content["settings"]
        if saved != self.settings:
            different = "; ".join(
                f"{key}: {saved.get(key, 'absent')!r} there, {self.settings.get(key, 'absent')!r} here"
                for key in sorted(saved.keys() | self.settings.keys())
                if saved.get(key) != self.settings.get(key)
            )
            raise MetaKDError(
                f"the checkpoint {self.path} belongs to a run with other settings ({different}); "
                "resume with the old settings, or choose another --output"
            )
        before, random = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}, _random_state()
        try:
            with loading("the training"):
                self._take_up(content["parts"], RngState.from_plain(content["random"]))
        except BaseException as error:
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            random.restore()
            if not isinstance(error, MetaKDError):
                raise
            raise MetaKDError(
                f"the checkpoint {self.path} does not fit this run: {error}; or delete it, or choose another --output"
            ) from error
        return content["history"]  # type: ignore[no-any-return]

    def _take_up(self, states: Mapping[str, Any], random: RngState) -> None:
        # Check all before changing any: some parts load a foreign state silently, in part.
        check_keys(states, self.parts, "the training", "parts")
        for name, part in self.parts.items():
            state, where = states[name], f"the training's {name}"
            if isinstance(part, torch.optim.Optimizer):
                check_optimizer_state(state, part, where)
            elif isinstance(part, torch.nn.Module):
                check_state(state, part.state_dict(), where)
            elif isinstance(part, LRScheduler):
                check_kind(state.keys(), part.state_dict().keys(), where)
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer_state(states[name], part, f"the training's {name}")
            else:
                part.load_state_dict(states[name])
        random.restore()

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            for key, kind in (("settings", dict), ("history", list), ("random", dict), ("parts", dict)):
                if not isinstance(content[key], kind):
                    raise TypeError(f"its {key!r} is {type(content[key]).__name__}")
        except Exception as error:  # a damaged pickle may raise anything
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise MetaKDError(
                f"the checkpoint {self.path} cannot be read ({type(error).__name__}: {first_line}); "
                "delete it to restart this part of the run, or choose another --output"
            ) from error
        return content


def _random_state() -> RngState:
    return RngState.capture(torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def fresh_folder(folder: Path, names: Iterable[str], *, finished: str = "results.json") -> None:
    """Prepare a folder for a new run.

    Removes the checkpoints ``<name>.pt`` and the record of a finished earlier run, so that they are not mistaken for
    the new run's. An unfinished run is kept and refused.

    Args:
        folder: of the run; created if missing.
        names: of the run's checkpoints.
        finished: the file that a run writes last.

    Raises:
        MetaKDError: the folder holds an unfinished run.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({}, Path(folder) / "student.pt")
        ...     fresh_folder(Path(folder), ["student"])
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = [folder / f"{name}.pt" for name in names if (folder / f"{name}.pt").exists()]
    if old and not (folder / finished).exists():
        raise MetaKDError(
            f"{folder} holds an unfinished run ({', '.join(path.name for path in old)}): continue it with "
            "--resume, choose another --output, or delete these files"
        )
    for path in (*old, folder / finished):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then move that file to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure may leave an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
