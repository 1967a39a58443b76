"""A job: a command with a time limit, and what it needs before it can start."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.measure import ROOT

UNFINISHED = 75
"""The exit status of a command that stopped in time, to go on in a later run."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: tells it from the others, in the log too.
        command: what follows `python`.
        limit: seconds after which it is killed.
        least: with fewer seconds left it is not started.
        packages: that it imports.
        file: that it runs, in the repository.
        after: the job that must be done before.
        stops: whether it takes `--until SECONDS`, stops by itself, and ends with `UNFINISHED` if it has to go on.
        beside: whether other such jobs may run at the same time; a measurement is alone.
        need: estimated seconds of the whole job, where it is known.
        kept: megabytes of the checkpoint of a job that goes on.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 15.0
    packages: tuple[str, ...] = ()
    file: str | None = None
    after: str | None = None
    stops: bool = False
    beside: bool = False
    need: float = 0.0
    kept: float = 0.0

    def lacks(self, root: Path = ROOT) -> str | None:
        """Why it cannot run here, or None."""
        missing = [package for package in self.packages if not _installed(package)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.file is not None and not (root / self.file).exists():
            return f"there is no {self.file}"
        return None


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
