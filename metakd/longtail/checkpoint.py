"""Checkpoints from which an interrupted run continues to the very same numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from metakd.errors import MetaKDError


class Stateful(Protocol):
    """Anything with a state: modules, optimizers, schedulers, a balancer."""

    def state_dict(self) -> Any:
        """The state as plain tensors, numbers and containers."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take up a state."""


class Checkpoint:
    """One training run's file: the states of its parts, its history, the random state and the settings.

    Written to a temporary file that then replaces the old one, so that a run killed at any moment leaves a
    whole checkpoint behind. Read with ``weights_only=True``: a checkpoint cannot run code.

    Args:
        path: the file.
        settings: everything that decides the run's numbers; a checkpoint of other settings is refused.
        parts: what has a state, by name; None for parts that this run does not have.

    Example:
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
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        write_atomically(self.path, lambda temporary: torch.save(content, temporary))

    def load(self) -> list[dict[str, Any]]:
        """Take up the saved state.

        Returns:
            The history, one entry an epoch; empty if there is no checkpoint.

        Raises:
            MetaKDError: the file cannot be read, or belongs to a run with other settings.
        """
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
        try:
            for name, part in self.parts.items():
                part.load_state_dict(content["parts"][name])
            torch.set_rng_state(content["random"]["cpu"])
            if content["random"]["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(content["random"]["cuda"])
            history: list[dict[str, Any]] = content["history"]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise MetaKDError(
                f"the checkpoint {self.path} does not fit this run ({type(error).__name__}: {error}); "
                "delete it, or choose another --output"
            ) from error
        return history

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            for key in ("settings", "history", "random", "parts"):
                content[key]
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise MetaKDError(
                f"the checkpoint {self.path} cannot be read ({type(error).__name__}: {first_line}); "
                "delete it to start this part of the run over, or choose another --output"
            ) from error
        return content


def fresh_folder(folder: Path, names: Iterable[str], *, finished: str = "results.json") -> None:
    """Make a folder ready for a run that starts anew.

    Takes away the checkpoints ``<name>.pt`` and the record of an earlier run that was finished, so that
    nothing of it is mistaken for the new run's; an unfinished run's are hours of work and stay.

    Args:
        folder: of the run; made if missing.
        names: of the run's checkpoints.
        finished: the file that a run writes last.

    Raises:
        MetaKDError: the folder holds an unfinished run.

    Example:
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
    """Call ``write`` with a temporary path beside ``path``, then put that file in ``path``'s place.

    Args:
        path: the file that is to be written whole or not at all.
        write: called with the temporary path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
